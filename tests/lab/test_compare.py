"""Comparisons on a person's own task: arms, plans, tuning with known answers, and the example through workers."""

from __future__ import annotations

import json
import logging
import math
import re
import textwrap
from pathlib import Path

import pytest
from lab_helpers import runs_in_process

from layerwise.lab import cli, progress, report
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments import methods
from layerwise.lab.experiments.plan import FACTORS_ALONE, LARGEST_SEEDS
from layerwise.lab.experiments.runner import Display, Settings
from layerwise.lab.experiments.tuning import edges, space_of
from layerwise.lab.report import layers as maps
from layerwise.lab.report import saved
from layerwise.lab.stats.comparison import MINIMUM_PAIRS
from layerwise.lab.tasks import compare, layout, tuning
from layerwise.lab.tasks import doctor as examination
from layerwise.lab.tasks import task as tasks

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_task.py"

QUADRATIC = '''
import torch
from torch import nn

class Bowl(nn.Module):
    """0.5 * |w - 1|^2 of a vector on the root and of one in a module: gradient descent is there at once at rate 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.inner = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.inner.weight, 3.0)

    def height(self):
        return 0.5 * ((self.w - 1).square().sum() + (self.inner.weight - 1).square().sum())

def task(seed, lr=0.25, kind="plain"):
    model = Bowl()
    return {
        "model": model,
        "batches": [0, 0],
        "loss": lambda model, batch: model.height(),
        "metric": lambda model: {"loss": float(model.height()) + 0.01 * seed},
        "validation": lambda model: float(model.height()),
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "epochs": 2,
    }
'''


def height_by_hand(lr: float, *, adaptive: bool, updates: int = 4) -> float:
    """Descend the two bowls in plain Python; 1 + log(1 + 1/|g|) of each layer, Singh et al. 2015, equation 9."""
    layers = [[0.0] * 3, [3.0] * 2]
    for _ in range(updates):
        for layer in layers:
            gradient = [w - 1.0 for w in layer]
            norm = math.sqrt(sum(g * g for g in gradient))
            factor = 1.0 + math.log(1.0 + 1.0 / norm) if adaptive and norm > 0 else 1.0
            layer[:] = [w - lr * factor * g for w, g in zip(layer, gradient, strict=True)]
    return 0.5 * sum((w - 1.0) ** 2 for layer in layers for w in layer)


@pytest.fixture
def bowl(tmp_path: Path) -> str:
    """Give the task whose best rates are known."""
    path = tmp_path / "bowl.py"
    path.write_text(QUADRATIC, encoding="utf-8")
    return f"{path}:task"


# --- Arms -------------------------------------------------------------------------------------------------------------


def test_the_arms_that_are_there_unless_others_are_named():
    arms = methods.make_arms()
    assert [arm.name for arm in arms] == list(methods.DEFAULT_ARMS)
    method = arms[1]
    assert method.against == ("plain", "mean-factor", "shuffled", "frozen")
    assert [(arm.control, arm.of) for arm in arms[2:]] == [
        ("mean factor", "layer-adaptive"),
        ("shuffled layers", "layer-adaptive"),
        ("frozen factors", "layer-adaptive"),
    ]


def test_every_method_has_its_mean_factor_and_the_controls_that_were_asked_for():
    arms = methods.make_arms(["lars", "larc", "shuffled:larc"])
    assert [arm.name for arm in arms] == [
        "plain", "lars", "mean-factor:lars", "larc", "mean-factor:larc", "shuffled:larc",
    ]  # fmt: skip
    assert arms[3].against == ("plain", "mean-factor:larc", "shuffled:larc")
    assert [arm.name for arm in methods.make_arms(["shuffled:lars"])] == ["plain", "lars", "mean-factor", "shuffled"]
    both = methods.make_arms(["lars", "larc", "frozen"])
    assert [arm.of for arm in both if arm.control == "frozen factors"] == ["lars", "larc"]


def test_amplification_is_compared_with_random_and_all_layers():
    arms = {
        arm.name: arm for arm in methods.make_arms(["amplification-G", "amplification-random", "amplification-all"])
    }
    against = ("plain", "mean-factor:amplification-G", "amplification-random", "amplification-all")
    assert arms["amplification-G"].against == against


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["layer-adaptiv"], ["'layer-adaptiv' is not known", "layer-adaptive, lars", "shuffled:lars"]),
        (["shuffled:plain"], ["'shuffled:plain' is not known"]),
        (["plain"], ["hold no method", "add one of layer-adaptive"]),
        (["shuffled"], ["hold no method"]),
    ],
)
def test_unknown_arms_are_refused(names, words):
    with pytest.raises(UsageError) as caught:
        methods.make_arms(names)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("epochs", [3, 4, 5, 15, 150])
def test_phases_amplify_at_least_one_epoch_after_the_analysis(epochs):
    rows = methods.task_phases(epochs)
    ends = [row[0] for row in rows]
    assert ends == sorted(set(ends))
    assert ends[-1] == epochs
    assert ends[1] - ends[0] >= 2
    assert [row[1] for row in rows] == [False, True, False][: len(rows)]
    if epochs == 150:
        assert rows == [[50, False, 1.0], [130, True, 2.0], [150, False, 1.0]]


def test_every_method_can_be_planned_and_those_that_count_epochs_need_some(bowl, tmp_path):
    plan = layout.plan(tasks.load(f"{EXAMPLE}:task"), arms=list(methods.METHODS), seeds=1)
    assert len(plan.runs) == 1 + 2 * len(methods.METHODS)
    assert any("LARS" in note and "--tune" in note for note in plan.notes)
    with pytest.raises(UsageError, match=r"epochs=2: amplification counts epochs; .* at least 3"):
        layout.plan(tasks.load(bowl), arms=["amplification-all"], seeds=1)


# --- Plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_pairs_its_runs_by_seed_and_is_what_json_holds(bowl):
    plan = layout.plan(tasks.load(bowl), seeds=3)
    assert (plan.name, plan.source, plan.layout, plan.step_unit) == ("bowl-task", "bowl.py:task", "curves", "epoch")
    assert (plan.quantity.name, plan.quantity.higher_is_better) == ("loss", False)
    assert len(plan.runs) == 15
    assert len(plan.chains()) == 6
    assert [other.name for _, _, other in plan.pairs()] == ["plain", "mean-factor", "shuffled", "frozen"]
    for run in plan.runs:
        plain = run.configuration.as_json()
        assert json.loads(json.dumps(plain)) == plain
        assert plain["trial"]["values"] == {}
        assert run.task.length == 2
    assert len({run.configuration.identity for run in plan.runs if run.arm.control is None}) == 6


@pytest.mark.parametrize("seeds", [0, LARGEST_SEEDS + 1])
def test_numbers_of_seeds_out_of_range_are_refused(bowl, seeds):
    with pytest.raises(UsageError, match=f"seeds={seeds}"):
        layout.plan(tasks.load(bowl), seeds=seeds)


def test_an_optimizer_that_a_rule_cannot_act_on_is_told_of_before_anything_is_trained(bowl, tmp_path):
    path = tmp_path / "bowl.py"
    path.write_text(QUADRATIC.replace("torch.optim.SGD", "torch.optim.LBFGS"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"bowl\.py:task: arm 'layer-adaptive' cannot be attached: .*LBFGS"):
        compare.run(bowl, settings=Settings(out=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arm", ["amplification-G", "amplification-G-prime"])
def test_a_choice_that_can_choose_no_layer_is_refused(bowl, arm):
    path = Path(bowl.rpartition(":")[0])
    path.write_text(QUADRATIC.replace('"epochs": 2', '"epochs": 3'), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        layout.plan(tasks.load(bowl), arms=[arm], seeds=1)
    words = str(caught.value)
    assert f"arm '{arm}' would be plain training: threshold=1 chooses nothing: z of 2 layers is at most 1.00" in words
    assert "a model of more layers; leave the arm out" in words
    assert layout.plan(tasks.load(bowl), arms=["amplification-all", "amplification-random"], seeds=1).runs


@pytest.mark.parametrize("silenced", ["basicConfig(level=logging.ERROR)", 'getLogger("layerwise").setLevel("ERROR")'])
def test_a_choice_that_can_choose_no_layer_is_refused_though_the_file_silences_warnings(
    bowl, tmp_path, capsys, silenced
):
    path = Path(bowl.rpartition(":")[0])
    quiet = f"import logging\nlogging.{silenced}\n"
    path.write_text(quiet + QUADRATIC.replace('"epochs": 2', '"epochs": 3'), encoding="utf-8")
    root, own = logging.getLogger(), logging.getLogger("layerwise")
    levels, handlers = (root.level, own.level), list(root.handlers)
    root.handlers.clear()  # pytest's own, with which basicConfig would do nothing
    try:
        asked = ["compare", bowl, "--arms", "plain,amplification-G", "--seeds", "1", "--jobs", "1"]
        assert cli.main([*asked, "--out", str(tmp_path / "runs")]) == 2
        assert logging.ERROR in (root.level, own.level)  # as the file has left it
    finally:
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        root.handlers[:] = handlers
    assert "arm 'amplification-G' would be plain training: threshold=1 chooses nothing" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_control_at_other_values_repeats_the_method_at_its_values(bowl):
    values = {"plain": {"lr": 1.0}, "layer-adaptive": {"lr": 0.5}, "mean-factor": {"lr": 0.5}, "shuffled": {"lr": 0.25}}
    plan = layout.plan(tasks.load(bowl), seeds=2, tuned={**values, "frozen": {"lr": 0.25}})
    assert [arm.name for arm in plan.arms] == [
        "plain", "layer-adaptive", "mean-factor", "layer-adaptive lr=0.25", "shuffled", "frozen",
    ]  # fmt: skip
    helper = plan.arm("layer-adaptive lr=0.25")
    assert (helper.rule, helper.against) == ({"name": "LayerAdaptive"}, ())
    assert plan.arm("mean-factor").of == "layer-adaptive"
    assert plan.arm("shuffled").of == plan.arm("frozen").of == helper.name
    used = {run.arm.name: run.configuration.trial["values"] for run in plan.runs}
    # 0.25 is the function's own default, so that a run at it is the run without it.
    assert used == {
        "plain": {"lr": 1.0}, "layer-adaptive": {"lr": 0.5}, "mean-factor": {"lr": 0.5},
        helper.name: {}, "shuffled": {}, "frozen": {},
    }  # fmt: skip
    for chain in plan.chains():
        assert len({json.dumps(run.configuration.trial) for run in chain}) == 1
    assert not any("Nothing was tuned" in note for note in plan.notes)


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_task_are_those_of_a_loop_by_hand(bowl, carried_out):
    outcome = carried_out(layout.plan(tasks.load(bowl), seeds=2))
    assert outcome.complete
    for arm, adaptive in (("plain", False), ("layer-adaptive", True)):
        for seed, value in outcome.results.values("task", arm).items():
            assert value == pytest.approx(height_by_hand(0.25, adaptive=adaptive) + 0.01 * seed, rel=1e-12)
    mean = outcome.results.mean_factor("task", "layer-adaptive")
    expected = height_by_hand(0.25 * mean, adaptive=False)
    assert outcome.results.values("task", "mean-factor")[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["lars", "larc", "layer-decay", "amplification-all"])
def test_every_control_can_repeat_every_kind_of_method(method, carried_out):
    task_file = tasks.load(f"{EXAMPLE}:task", {"batch_size": 700})
    outcome = carried_out(layout.plan(task_file, arms=[method, "shuffled", "frozen"], seeds=1))
    records = {arm: record for (_, arm, _), record in outcome.results.records.items()}
    assert set(records) == {"plain", method, "mean-factor", "shuffled", "frozen"}
    factors = {arm: records[arm].summary["factor"] for arm in (method, "frozen", "shuffled")}
    layers = factors[method]["layers"]
    assert factors["frozen"]["layers"] == pytest.approx(layers, rel=1e-9)
    if method in ("lars", "larc"):  # whose layers are parameters, without the biases
        assert factors[method]["excluded"] == ["0.bias", "2.bias", "5.bias"]
        weights = [value for name, value in layers.items() if name.endswith("weight")]
        assert factors[method]["mean"] == pytest.approx(sum(weights) / 3, rel=1e-12)
        assert all(factors["shuffled"]["layers"][name] == 1.0 for name in factors[method]["excluded"])
    for arm in (method, "frozen", "shuffled"):  # the maps have the layers that the rule has, whatever the network's are
        drawn = maps.grid(outcome.results, "task", arm, "factor")
        assert set(drawn.layers) == set(factors[arm]["layers"])
        for name, line in drawn.values.items():
            assert sum(line) / len(line) == pytest.approx(factors[arm]["layers"][name], rel=1e-9)
        assert set(maps.grid(outcome.results, "task", arm, "gradient_norm").layers) == {"0", "2", "5"}
    assert report.write(outcome, "").stat().st_size > 0
    place = records["shuffled"].configuration.rule["layers"]
    assert {name: factors["shuffled"]["layers"][name] for name in place} == pytest.approx(
        {name: layers[source] for name, source in place.items()}, rel=1e-12
    )


def test_controls_of_a_method_that_diverges_at_once_are_carried_out_too(bowl, tmp_path, carried_out):
    path = Path(bowl.rpartition(":")[0])
    path.write_text(QUADRATIC.replace("model.height(),\n", "model.height() * float('nan'),\n", 1), encoding="utf-8")
    outcome = carried_out(layout.plan(tasks.load(bowl), seeds=1))
    assert outcome.complete
    assert all(record.diverged for record in outcome.results.records.values())


@pytest.mark.full
def test_the_example_through_workers_is_the_example_in_this_process(tmp_path, carried_out):
    asked = {"arms": ["layer-adaptive", "shuffled"], "seeds": 1}
    task_file = tasks.load(f"{EXAMPLE}:task")
    here = carried_out(layout.plan(task_file, **asked))
    outcome = compare.run(f"{EXAMPLE}:task", **asked, settings=Settings(out=tmp_path / "workers", jobs=2))
    assert not outcome.failures, outcome.failures[0].details
    assert outcome.complete
    for key, record in outcome.results.records.items():
        assert record.summary["weights"] == here.results.records[key].summary["weights"]
        assert record.summary["finals"]["test_error"] < 30.0
    again = compare.run(f"{EXAMPLE}:task", **asked, settings=Settings(out=tmp_path / "workers", jobs=1))
    assert (again.found, again.complete) == (4, True)


@pytest.mark.usefixtures("in_process")
def test_a_mistake_in_a_task_fails_the_run_in_its_words(bowl, tmp_path):
    path = Path(bowl.rpartition(":")[0])
    path.write_text(QUADRATIC.replace("lambda model, batch: model.height()", "shrink"), encoding="utf-8")
    with path.open("a", encoding="utf-8") as stream:
        stream.write(
            textwrap.dedent("""
            calls = []

            def shrink(model, batch):
                calls.append(1)
                return model.height() if len(calls) < 3 else None
            """)
        )
    outcome = compare.run(bowl, arms=["layer-adaptive"], seeds=1, settings=Settings(out=tmp_path / "runs", jobs=1))
    assert [failure.reason for failure in outcome.failures] == [
        "UsageError: bowl.py:task: loss returned NoneType: return a scalar tensor"
    ] * 2
    assert outcome.exit_code == 1


@pytest.mark.full
def test_loaders_may_have_workers_of_their_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset

        def task(seed):
            inputs = torch.randn(8, 4)
            loader = DataLoader(TensorDataset(inputs, inputs.sum(1)), batch_size=4, shuffle=True, num_workers=1)
            return {
                "model": nn.Linear(4, 1),
                "batches": loader,
                "loss": lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square().mean(),
                "metric": lambda model: {"error": 1.0},
                "epochs": 1,
            }
        """),
        encoding="utf-8",
    )
    settings = Settings(out=tmp_path / "runs", jobs=1)
    outcome = compare.run(f"{path}:task", arms=["layer-adaptive"], seeds=1, settings=settings)
    assert not outcome.failures, outcome.failures[0].details
    assert outcome.complete


# --- Tuning -----------------------------------------------------------------------------------------------------------

GRID = (0.25, 0.5, 1.0, 2.5)


class Told(Display):
    """Keeps what a person is told between tuning and comparison."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def say(self, words: str) -> None:
        self.words.append(words)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Tune the bowl and compare: three seeds."""
    folder = tmp_path_factory.mktemp("bowl")
    (folder / "bowl.py").write_text(QUADRATIC, encoding="utf-8")
    name, settings = f"{folder / 'bowl.py'}:task", Settings(out=folder / "runs", jobs=1)
    told = Told()
    with runs_in_process():
        outcome = compare.run(name, {"lr": GRID}, seeds=3, settings=settings, display=told)
    assert not outcome.failures, outcome.failures[0].details
    # All runs of the tuning are found again, so that this trains nothing.
    again = tuning.tune(tasks.load(name), {"lr": GRID}, settings=settings)
    assert again.outcome is not None
    assert again.outcome.found == again.outcome.planned
    assert told.words == again.choices
    return outcome, again


def test_a_report_of_tuned_runs_compares_what_the_experiment_did(bowl, carried_out):
    rates = {"plain": 0.5, "layer-adaptive": 0.25, "mean-factor": 0.5, "shuffled": 0.25, "frozen": 0.75}
    chosen = {arm: {"lr": rate} for arm, rate in rates.items()}
    outcome = carried_out(layout.plan(tasks.load(bowl), seeds=2, tuned=chosen))
    alone = [arm for arm in outcome.plan.arms if arm.words.endswith(FACTORS_ALONE)]
    assert [arm.against for arm in alone] == [(), ()]
    report.write(outcome, "")
    (found,) = saved.gather([outcome.settings.out], out=outcome.settings.out)
    assert list(found.plan.pairs()) == list(outcome.plan.pairs())


def test_each_arm_gets_the_value_that_is_best_by_hand(tuned):
    outcome, tuning_ = tuned
    for arm, adaptive in (("plain", False), ("layer-adaptive", True)):
        heights = [height_by_hand(rate, adaptive=adaptive) for rate in GRID]
        assert tuning_.scores("task", arm) == pytest.approx(heights, rel=1e-9, abs=1e-30)
        assert tuning_.chosen("task", arm) == {"lr": GRID[heights.index(min(heights))]}
    assert tuning_.chosen("task", "plain") == {"lr": 1.0}
    assert tuning_.chosen("task", "layer-adaptive") != {"lr": 1.0}
    for arm in outcome.plan.arms:
        if arm.name in methods.DEFAULT_ARMS:
            assert dict(arm.constants) == tuning_.chosen("task", arm.name)
    assert outcome.complete
    for seed, value in outcome.results.values("task", "plain").items():
        assert value == pytest.approx(height_by_hand(1.0, adaptive=False) + 0.01 * seed, abs=1e-12)


def test_every_arm_has_the_same_budget_on_seeds_that_are_not_compared(tuned):
    outcome, tuning_ = tuned
    assert tuning_.results.plan.seeds == (10_000, 10_001)
    assert not set(tuning_.results.plan.seeds) & set(outcome.plan.seeds)
    assert min(tuning_.results.plan.seeds) > LARGEST_SEEDS
    tried: dict[str, set[tuple[str, int]]] = {}
    for run in tuning_.results.plan.runs:
        tried.setdefault(run.arm.name, set()).add((run.subject, run.seed))
        assert run.configuration.trial["measure"] == "validation"
    assert list(tried) == list(methods.DEFAULT_ARMS)
    assert all(cells == tried["plain"] for cells in tried.values())
    assert len(tried["plain"]) == 2 * len(GRID)
    for record in tuning_.results.records.values():
        assert set(record.summary["finals"]) <= {"training_loss", "validation"}
    for (_, arm, _), record in outcome.results.records.items():
        assert "validation" not in record.summary["finals"], arm


def test_the_notes_say_what_was_tried_and_chosen(tuned):
    outcome, tuning_ = tuned
    text = " ".join(outcome.plan.notes)
    assert "lr of 0.25, 0.5, 1, 2.5" in text
    assert "4 settings on the same 2 seeds (10000, 10001), 8 runs an arm" in text
    assert "Chosen: plain: lr=1; layer-adaptive: lr=" in text
    assert tuning_.choices[0].startswith("Chosen: plain: lr=1; layer-adaptive: lr=")
    assert all(words.startswith("Warning: ") for words in tuning_.choices[1:])
    at_edge = {arm for arm in methods.DEFAULT_ARMS if tuning_.chosen("task", arm)["lr"] in (0.25, 2.5)}
    assert text.count("at the edge of its values") == len(at_edge)
    assert "Warning: plain" not in text


@pytest.mark.usefixtures("in_process")
def test_a_setting_that_diverges_is_the_worst_and_of_equal_ones_the_first_is_taken(bowl, tmp_path):
    settings = Settings(out=tmp_path / "runs", jobs=1)
    grid = {"lr": [1e200, 1.0, 3.0], "kind": ["plain", "other"]}
    found = tuning.tune(tasks.load(bowl), grid, arms=["layer-adaptive"], seeds=1, settings=settings)
    assert not found.outcome.failures, found.outcome.failures[0].details
    scores = found.scores("task", "plain")
    assert scores[:2] == [math.inf, math.inf]
    assert scores[2] == scores[3] == 0.0
    assert found.chosen("task", "plain") == {"lr": 1.0, "kind": "plain"}


def test_only_a_value_beyond_which_there_could_be_better_ones_is_at_the_edge():
    grid = {"decay": (0, 0.1, 0.2), "lr": (0.1, 0.2), "kind": ("a", "b"), "one": (3,)}
    tried = space_of(grid).settings
    assert len(tried) == 12
    assert edges({"decay": 0, "lr": 0.1, "kind": "a", "one": 3}, tried) == ["lr"]
    assert edges({"decay": 0.2, "lr": 0.2, "kind": "b", "one": 3}, tried) == ["decay", "lr"]
    assert edges({"decay": 0.1, "lr": 0.1, "kind": "b", "one": 3}, tried) == ["lr"]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"rate": [0.1]}, ["rate=0.1 is no parameter", "its own are lr, kind"]),
        ({"lr": []}, ["tune lr=[]", "list of values"]),
        ({"lr": "0.1"}, ["tune lr='0.1'", "list of values"]),
        ({"lr": [0.1, math.nan]}, ["lr=nan", "finite"]),
        ({"lr": ["abc", 0.1]}, ["lr='abc'", "must be a number, as its default 0.25 is"]),
        ({"lr": [0.001 * k for k in range(1, 50)], "kind": [str(k) for k in range(50)]}, ["2450 settings", "1000"]),
    ],
    ids=["unknown", "no value", "a word", "NaN", "a word among numbers", "too many"],
)
def test_grids_that_cannot_be_tuned_are_refused_before_anything_is_trained(bowl, tmp_path, grid, words):
    with pytest.raises(UsageError) as caught:
        compare.run(bowl, grid, settings=Settings(out=tmp_path / "runs"))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_tuning_needs_a_validation(bowl, tmp_path):
    path = tmp_path / "bowl.py"
    path.write_text(QUADRATIC.replace('"validation": lambda model: float(model.height()),', ""), encoding="utf-8")
    with pytest.raises(UsageError, match="no validation, which --tune needs"):
        compare.run(bowl, {"lr": [0.1]}, settings=Settings(out=tmp_path / "runs"))


# --- The doctor -------------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_a_comparison_would_do(capsys):
    found = examination.examine(tasks.load(f"{EXAMPLE}:task"))
    text = "\n".join(found.lines)
    assert capsys.readouterr().out == ""
    for words in (
        "lr=0.05, weight_decay=0.0005", "5,994 numbers, float32", "SGD, no scheduler", "55 an epoch",
        "3 epochs, 165 updates", "test_error is", "lower is better; 3 times a run", "there, so that --tune works",
        "5 seeds: 25 runs", "LayerAdaptive on SGD: 3 layers, 6 parameter tensors", "problems    none found",
    ):  # fmt: skip
        assert words in text
    assert f"{MINIMUM_PAIRS} seeds" in text
    assert found.problems == []
    assert "LayerwiseLR(" not in text  # what a program would do next; a comparison does it itself


def test_the_doctor_finds_what_is_wrong(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        class Schedule(torch.optim.lr_scheduler.LRScheduler):
            def get_lr(self):
                return [group["lr"] for group in self.optimizer.param_groups]

            def state_dict(self):
                return {"cannot be loaded": object}

        def task(seed):
            model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
            optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
            return {
                "model": model,
                "batches": lambda epoch: (torch.ones(2, 2) for _ in range(4)),
                "loss": lambda model, batch: model[0](batch).square().mean(),
                "metric": lambda model: {"error": 1.0},
                "optimizer": optimizer,
                "scheduler": Schedule(optimizer),
            }
        """),
        encoding="utf-8",
    )
    text = "\n".join(examination.examine(tasks.load(f"{path}:task")).lines)
    assert "an unknown number an epoch" in text
    assert "how long is not known" in text
    assert "none, which --tune needs" in text
    assert "problem     numbers are not finite from update 1 on: ‖Δw‖ inf in '0'" in text
    assert "the loss is not finite" not in text  # told once, though the dry run meets it too
    assert "problem     the loss gives no gradient to 1.weight, 1.bias" in text
    assert "problem     a checkpoint cannot be read again" in text


def test_the_doctor_tells_of_an_optimizer_that_cannot_be_compared(bowl):
    path = Path(bowl.rpartition(":")[0])
    path.write_text(QUADRATIC.replace("torch.optim.SGD", "torch.optim.LBFGS"), encoding="utf-8")
    found = examination.examine(tasks.load(bowl))
    (problem,) = found.problems  # though the plan, the updates and the diagnosis find it
    assert problem.startswith("bowl.py:task: arm 'layer-adaptive' cannot be attached: LBFGS evaluates its closure")
    assert "nan" not in "\n".join(found.lines)


def test_the_doctor_counts_what_a_comparison_takes_beside_its_updates(bowl):
    tried = tasks.load(bowl).tried()
    (_, comparison) = examination._times(tried, 2.0, 2)
    # 25 runs of 4 updates and 2 tests, two side by side, and what is there before and after them.
    seconds = 25 * (4 * 2.0 + 2 * tried.metric_seconds + examination.RUN_SECONDS) / 2 + examination.BESIDE_SECONDS
    assert f"about {progress.duration(seconds)} on free cores" in comparison
    (_, comparison) = examination._times(tried, 0.0, 2)
    assert int(re.search(r"about (\d+) s", comparison)[1]) >= 10


def test_a_chain_with_a_task_can_be_sent_to_a_worker(bowl, tmp_path):
    import pickle

    for chain in layout.plan(tasks.load(bowl), seeds=1).chains():
        given = chains.Chain(runs=chain, out=tmp_path)
        assert pickle.loads(pickle.dumps(given)) == given
