"""The protocol of tuning, of recipes and tasks alike: equal numbers of trials, edges, draws, data that are not read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_helpers import do_here, runs_in_process, tiny_tuned
from made_up import finish_plan, noise, only, outcome_of, table_plan, table_value

from layerwise.lab import cli, data, report
from layerwise.lab.catalogue import entries
from layerwise.lab.data import digits
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import runner as experiment
from layerwise.lab.experiments import tuned_recipe
from layerwise.lab.experiments.plan import LARGEST_SEEDS, RATES, Arm, Plan, Subject, Tuning
from layerwise.lab.experiments.recipe import Recipe, load
from layerwise.lab.experiments.recipe import names as recipe_names
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome, Settings
from layerwise.lab.experiments.tuned_recipe import TunedRecipe
from layerwise.lab.experiments.tuning import Range, Space, Tuner, range_of, setting_words, space_of, with_ratios
from layerwise.lab.models.perceptron import Perceptron
from layerwise.lab.options import ranges
from layerwise.lab.report import saved, terminal
from layerwise.lab.report.verdicts import standings
from layerwise.lab.runs.configuration import Constants
from layerwise.lab.runs.folder import Runs
from layerwise.lab.tasks import compare
from layerwise.lab.training import networks, trial
from layerwise.lab.training.engine import Training
from layerwise.lab.training.streams import with_validation

# --- Settings ---------------------------------------------------------------------------------------------------------


def test_a_range_has_values_in_equal_ratios():
    assert range_of("lr", "1e-3:1e1:9") == range_of("lr", "1e-3:1e1:9") == Range(1e-3, 1e1, 9)
    expected = [0.001, 0.003162, 0.01, 0.03162, 0.1, 0.3162, 1.0, 3.162, 10.0]  # 10^(-3 + k / 2), four digits
    assert list(Range(1e-3, 1e1, 9).values()) == expected
    assert Range(1e-3, 1e1, 9).ratio == pytest.approx(math.sqrt(10.0), rel=1e-14)
    assert range_of("lr", "1e-3:1e1") == Range(1e-3, 1e1)
    assert range_of("kind", "a:b") is range_of("kind", "plain") is range_of("lr", 0.1) is None


def test_every_arm_draws_the_same_settings_within_the_ranges():
    first = space_of({"lr": ["1e-3:1e1"], "decay": [0.0, 0.1]}, 40)
    assert first == space_of({"lr": ["1e-3:1e1"], "decay": [0.0, 0.1]}, 40)
    rates = [each["lr"] for each in first.settings]
    assert len(first.settings) == 40
    assert len(set(rates)) > 35
    assert all(1e-3 <= rate <= 1e1 for rate in rates)
    assert {each["decay"] for each in first.settings} == {0.0, 0.1}
    # Half of the draws are expected below the geometric middle, 0.1; 10 of 40 or fewer have a chance of 0.1 %.
    assert 10 < sum(rate < 0.1 for rate in rates) < 30
    assert first.settings[:5] == space_of({"lr": ["1e-3:1e1"], "decay": [0.0, 0.1]}, 5).settings
    assert first.words == "40 draws of lr from 0.001 to 10; decay of 0, 0.1"


def test_a_search_draws_multipliers_whose_geometric_mean_is_one():
    arm = Arm(name="search", words="search", rule={"name": "ByRole"}, search={"roles": ["qk", "vo", "ffn"]})
    found = with_ratios(space_of({"rate": "0.1:10:20"}), arm, [arm])
    assert [each["rate"] for each in found.settings] == list(Range(0.1, 10.0, 20).values())
    drawn = [each["ratios"] for each in found.settings]
    assert len({json.dumps(each) for each in drawn}) == 20
    for ratios in drawn:
        assert list(ratios) == ["qk", "vo", "ffn"]
        assert math.prod(ratios.values()) == pytest.approx(1.0, abs=2e-3)  # of four digits each
        assert max(ratios.values()) / min(ratios.values()) <= 64.1
    control = Arm(name="mean", words="mean", control="mean factor", of="search")
    assert with_ratios(space_of({"rate": "0.1:10:20"}), control, [arm, control]).settings == found.settings
    plain = replace(arm, search=None)
    assert with_ratios(found, plain, [plain]) is found
    assert setting_words({"rate": 0.1, "ratios": {"qk": 2.0, "vo": 0.5}}) == "rate=0.1, ratios=qk 2 vo 0.5"


def test_whole_numbers_of_a_range_are_rounded_and_stand_once():
    found = space_of({"width": "2:4:5"}, whole=["width"])
    assert [each["width"] for each in found.settings] == [2, 3, 4]
    assert not found.ratios
    assert all(isinstance(each["width"], int) for each in space_of({"width": "2:400"}, 9, whole=["width"]).settings)


@pytest.mark.parametrize(
    ("grid", "draws", "words"),
    [
        ({"lr": "1:0.1:5"}, None, ["tune lr='1:0.1:5'", "0 < LOW < HIGH", "lr=1e-3:1e1:9"]),
        ({"lr": "0:1:5"}, None, ["0 < LOW < HIGH"]),
        ({"lr": "0.1:1:1"}, None, ["COUNT from 2 to 1000"]),
        ({"lr": "0.1:1"}, None, ["has no number of values", "write lr=0.1:1:9, or add random:N"]),
        ({"lr": "0.1:1:9"}, 5, ["tune lr=0.1:1:9 has a number of values: write lr=0.1:1, of which values are drawn"]),
        ({"lr": "0.1:1"}, 0, ["tune random:0: must be from 1 to 1000 draws"]),
    ],
)
def test_ranges_that_cannot_be_are_refused_with_a_remedy(grid, draws, words):
    with pytest.raises(UsageError) as caught:
        space_of(grid, draws)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_remedies_for_ranges_work():
    assert len(space_of({"lr": "0.1:1:9"}).settings) == len(space_of({"lr": "0.1:1"}, 9).settings) == 9


def test_the_command_line_takes_ranges_and_draws():
    assert ranges(["lr=1e-3:1e1:9", "width=4,8"]) == ({"lr": ["1e-3:1e1:9"], "width": [4, 8]}, None)
    assert ranges(["lr=1e-3:1e1", "random:12"]) == ({"lr": ["1e-3:1e1"]}, 12)
    for wrong in (["random:0"], ["random:x"], ["random:"], ["random:3", "random:4"]):
        with pytest.raises(UsageError, match="give random:N once, N the number of draws, as random:12"):
            ranges(wrong)


# --- Rounds, on a bench whose scores are known ------------------------------------------------------------------------

SUBJECTS = (Subject(name="one", words="one"), Subject(name="two", words="two"))
ARMS = (
    Arm(name="plain", words="plain"),
    Arm(name="method", words="method", rule={"name": "LayerAdaptive"}, against=("plain",)),
    Arm(name="mean", words="mean", control="mean factor", of="method"),
)


@dataclass
class Scored(Results):
    """Results of which every seed of an arm has the same score; None where it diverged."""

    score: Callable[[str, str], float | None] = lambda subject, arm: None

    def values(self, subject: str, arm: str, step: int | None = None) -> dict[int, float]:
        score = self.score(subject, arm)
        return {} if score is None else dict.fromkeys(self.plan.seeds, score)


class Known:
    """A bench whose score is the distance of the rate's logarithm from the arm's best, by powers of ten."""

    subjects = SUBJECTS

    def __init__(self, best: dict[str, float], grid: str = "0.1:10:3") -> None:
        self.best, self.grid = best, grid
        self.read = load("singh2015-table1").plan("smoke", seeds=1)

    def arms_of(self, subject: str) -> tuple[Arm, ...]:
        return ARMS

    def space(self, subject: str, arm: Arm) -> Space:
        return space_of({"rate": self.grid})

    def trials(self, pairs: Any, arms: Any, seeds: Any) -> Plan:
        template = self.read.runs[0]
        runs = tuple(replace(template, subject=at.name, arm=arm, seed=seed) for _, at, arm in pairs for seed in seeds)
        subjects = tuple({at.name: at for _, at, _ in pairs}.values())
        return replace(self.read, subjects=subjects, arms=tuple(arms), seeds=tuple(seeds), runs=runs, columns=())

    def comparison(self, tuner: Tuner) -> Plan:
        raise AssertionError

    def rounds(self, **more: Any) -> tuple[Tuner, list[Plan]]:
        """Let rounds follow one another until there is none."""
        tuner, plans = Tuner(self, **more), []
        while not plans or tuner.read(Outcome(plans[-1], Settings(), self.scored(plans[-1]))):
            plans.append(tuner.plan())
        return tuner, plans

    def scored(self, plan: Plan) -> Results:
        def score(subject: str, arm: str) -> float | None:
            rate = float(subject.rpartition("=")[2])
            best = self.best.get(f"{subject.split()[0]} {arm}", 1.0)
            return abs(math.log10(rate) - math.log10(best)) if math.isfinite(best) else None

        return Scored(plan, score=score)


def test_a_best_value_at_the_edge_is_extended_by_the_same_step_until_it_is_inside():
    tuner, plans = Known({"one plain": 300.0, "two method": 0.012}).rounds()
    assert tuner.tried["one", "plain"] == [{"rate": rate} for rate in (0.1, 1.0, 10.0, 100.0, 1000.0)]
    assert tuner.tried["two", "method"] == [{"rate": rate} for rate in (0.1, 1.0, 10.0, 0.01, 0.001)]
    assert tuner.chosen("one", "plain") == {
        "rate": 100.0 if abs(2 - math.log10(300)) < abs(3 - math.log10(300)) else 1000.0
    }
    assert tuner.chosen("two", "method") == {"rate": 0.01}
    assert all(len(tuner.tried[key]) == 3 for key in tuner.tried if key not in {("one", "plain"), ("two", "method")})
    assert len(plans) == 3
    text = " ".join(tuner.notes)
    assert "plain on one had 2 settings more, beyond the edge of its range." in text
    assert "Warning" not in text


def test_an_edge_that_stays_one_is_flagged_after_so_many_extensions():
    tuner, _ = Known({"one plain": 1e9}).rounds(extensions=2)
    assert [each["rate"] for each in tuner.tried["one", "plain"]] == [0.1, 1.0, 10.0, 100.0, 1000.0]
    (warning,) = tuner.warnings(SUBJECTS[0], ARMS[0])
    assert warning == (
        "Warning: plain on one has rate=1000, at the edge of its values: better ones may lie beyond, though it was "
        "extended."
    )
    tuner, plans = Known({"one plain": 1e9}).rounds(extensions=0)
    assert (len(plans), len(tuner.tried["one", "plain"])) == (1, 3)
    assert "Warning: plain on one has rate=10" in " ".join(tuner.choices)


def test_equal_scores_inside_need_no_value_beyond_the_edge():
    tuner = Tuner(Known({"one plain": 1.0}))
    plan = tuner.plan()
    assert not tuner.read(Outcome(plan, Settings(), Scored(plan, score=lambda subject, arm: 0.5)))
    assert tuner.chosen("one", "plain") == {"rate": 0.1}
    assert tuner.warnings(SUBJECTS[0], ARMS[0]) == []


def test_diverged_settings_are_the_worst_and_smaller_rates_are_tried():
    tuner, _ = Known({"one plain": math.inf}).rounds()
    assert tuner.scores("one", "plain") == [math.inf] * 6
    assert [each["rate"] for each in tuner.tried["one", "plain"]] == [0.1, 1.0, 10.0, 0.01, 0.001, 0.0001]
    assert tuner.warnings(SUBJECTS[0], ARMS[0]) == [
        "Warning: plain on one diverged at every setting; the first one stands."
    ]


def test_a_control_beyond_its_grid_has_its_method_there_for_its_factors_alone():
    tuner, plans = Known({"one mean": 100.0}).rounds()
    runs = [run for run in plans[-1].runs if run.subject == "one rate=100"]
    assert {run.arm.name for run in runs} == {"method", "mean"}
    assert runs[0].arm.name == "method"
    assert len(tuner.tried["one", "method"]) == 3
    assert len(tuner.scores("one", "method")) == 3


def test_arms_with_other_numbers_of_settings_are_refused():
    bench = Known({})
    bench.space = lambda subject, arm: space_of({"rate": "0.1:10:4" if arm.name == "plain" else "0.1:10:3"})
    with pytest.raises(UsageError, match="arms have 3 and 4 settings: give each as many as the others"):
        Tuner(bench)


# --- Data -------------------------------------------------------------------------------------------------------------


class Closed:
    """Test images and labels that must not be read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test images were read: {name}")

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("the test images were read")

    def __len__(self) -> int:
        raise AssertionError("the test images were counted")


def test_validation_images_are_the_last_of_the_training_images_and_are_not_trained_on():
    whole = digits.load()
    plain = with_validation(whole, 500, None, measure=False)
    assert len(plain.train_labels) == 3500
    assert plain.test_images is whole.test_images
    tuning = with_validation(replace(whole, test_images=Closed(), test_labels=Closed()), 500, 1000, measure=True)
    assert torch.equal(tuning.test_images, whole.train_images[3500:])
    assert torch.equal(tuning.test_labels, whole.train_labels[3500:])
    assert torch.equal(tuning.train_images, plain.train_images)
    assert with_validation(whole, None, None, measure=False) is whole


@pytest.mark.parametrize(("count", "train"), [(4000, None), (3500, 501), (5000, 1)])
def test_more_validation_images_than_there_are_left_are_refused(count, train):
    with pytest.raises(UsageError, match="give fewer images of validation or of training"):
        with_validation(digits.load(), count, train, measure=True)


def test_a_measure_on_validation_needs_its_images():
    constants = load("singh2015-table1").plan("smoke").runs[0].configuration.trial
    with pytest.raises(UsageError, match="measured='validation' without validation images: give validation_count"):
        Constants.of({**constants, "measured": "validation"})
    assert Constants.of({**constants, "measured": "validation", "validation_count": 100}).measured == "validation"


# --- A recipe ---------------------------------------------------------------------------------------------------------

NAME = "depth-without-normalisation"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Carry the tiny recipe out: its trials must not read the test images."""
    out, seen = tmp_path_factory.mktemp("tuned"), []
    whole, loaded = digits.load(), data.load

    def read(name: str, data_dir: Path | None = None) -> Any:
        return replace(whole, test_images=Closed(), test_labels=Closed()) if not seen else loaded(name, data_dir)

    compare_ = tuned_recipe.carry_out_tuned

    def then(tuner: Tuner, *given: Any) -> Outcome:
        seen.append(tuner)
        trial._source.cache_clear()
        return compare_(tuner, *given)

    with runs_in_process(), pytest.MonkeyPatch.context() as patch:
        trial._source.cache_clear()
        patch.setattr(data, "load", read)
        patch.setattr(tuned_recipe, "carry_out_tuned", then)
        outcome = tuned_recipe.run(tiny_tuned(), Settings(out=out, jobs=1))
    trial._source.cache_clear()
    assert not outcome.failures, outcome.failures[0].details
    return outcome, seen[0]


def test_a_recipes_trials_never_read_the_test_images_and_its_comparison_does(tuned):
    outcome, tuner = tuned
    assert outcome.complete
    assert tuner.outcome.complete
    for record in tuner.results.records.values():
        assert set(record.summary["finals"]) == {
            "validation_error", "validation_accuracy", "validation_loss", "training_loss",
        }  # fmt: skip
    for record in outcome.results.records.values():
        assert {"test_error", "accuracy"} <= set(record.summary["finals"])
        assert record.configuration.constants.validation_count == 500


def test_every_arm_of_a_recipe_has_as_many_trials_on_seeds_that_are_not_compared(tuned):
    outcome, tuner = tuned
    assert not set(tuner.seeds) & set(outcome.plan.seeds)
    assert min(tuner.seeds) > LARGEST_SEEDS
    counts: dict[tuple[str, str], set[Any]] = {}
    for run in tuner.outcome.plan.runs:
        counts.setdefault((run.subject.split()[0], run.arm.name), set()).add(
            (run.configuration.constants.rate, run.seed)
        )
    assert len(counts) == 8
    assert {len(found) for found in counts.values()} == {2}
    told = outcome.plan.tuning
    assert {(one.subject, one.arm) for one in told.arms} == set(counts)
    assert {len(one.trials) for one in told.arms} == {2}
    assert told.runs == 16
    assert told.seconds == pytest.approx(sum(record.summary["seconds"] for record in tuner.results.records.values()))


def test_each_arm_is_compared_at_the_rate_that_was_best_on_its_subject(tuned):
    outcome, _tuner = tuned
    for one in outcome.plan.tuning.arms:
        scores = [trial.score for trial in one.trials]
        assert one.chosen == one.trials[scores.index(min(scores))].setting
        runs = [run for run in outcome.plan.runs if (run.subject, run.arm.name) == (one.subject, one.arm)]
        assert {run.configuration.constants.rate for run in runs} == {one.chosen["rate"]}
        assert {run.seed for run in runs} == set(outcome.plan.seeds)
    for chain in outcome.plan.chains():  # a control has the rate of the run whose factors it repeats
        assert len({run.configuration.constants.rate for run in chain}) == 1


def test_the_tuning_is_on_the_page_and_in_the_terminal_and_a_report_keeps_it(tuned, capsys):
    outcome, _ = tuned
    page = report.write(outcome, "").read_text(encoding="utf-8")
    for words in (
        "<h2>Tuning</h2>",
        "The tuning took 16 runs",
        "method, tuned",
        "not shown",
        "all that was tried",
        "reached by 0 of 2",
    ):
        assert words in page
    assert cli.main(["report", str(outcome.settings.out)]) == 0
    said = capsys.readouterr().out
    assert "The tuning took 16 runs" in said
    assert "not shown" in said
    (found,) = saved.gather([outcome.settings.out], out=outcome.settings.out)
    assert found.plan.tuning == outcome.plan.tuning
    assert cli.main(["report", str(outcome.settings.out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {each["word"] for each in told["standings"]} == {"not shown"}
    assert {each["item"] for each in told["standings"]} == {"normalised"}  # Adam is another optimizer, and no rule
    assert told["tuning"]["runs"] == 16


def test_a_plan_with_a_choice_that_was_not_tried_is_damaged(tuned):
    outcome, _ = tuned
    content = json.loads(saved.as_json(outcome.plan))
    assert saved.plan_of(content).tuning == outcome.plan.tuning
    content["tuning"]["arms"][0]["chosen"] = {"rate": 123.0}
    with pytest.raises(ValueError, match="has chosen a setting that it did not try"):
        saved.plan_of(content)


def test_torchrun_is_refused_for_a_tuned_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", NAME, "--scale", "smoke", "--out", str(tmp_path)]) == 2
    assert "is tuned, and torchrun cannot share its trials: leave torchrun out" in capsys.readouterr().err


def test_a_tuning_that_is_stopped_goes_on_and_repeats_nothing(tuned, tmp_path, monkeypatch, capsys):
    outcome, _tuner = tuned
    done: list[str] = []
    left = [5]

    def a_few(jobs: Any, count: int, **how: Any) -> Any:
        """Do some chains and then be interrupted, as a kill does between two runs."""
        stop = how["stop"]
        how["stop"] = lambda: stop() or len(done) >= left[0]
        on_message = how["on_message"]

        def seen(worker: int, message: Any) -> None:
            done.extend([message.configuration.name] if type(message).__name__ == "Finished" else [])
            on_message(worker, message)

        return do_here(jobs, count, **{**how, "on_message": seen})

    threads = torch.get_num_threads()
    monkeypatch.setattr(experiment, "_local", a_few)
    first = tuned_recipe.run(tiny_tuned(), Settings(out=tmp_path, jobs=1))
    assert not first.complete
    assert first.plan.name == "tiny-smoke-tuning"
    assert 0 < len(first.results.records) < first.planned
    terminal.show(first, terminal.console())
    said = " ".join(capsys.readouterr().out.split())
    done_count = len(first.results.records)
    assert f"Incomplete: {done_count} of 16 runs of the tuning are finished; the same command goes on." in said
    assert "Report:" not in said
    assert "%" not in said  # no table
    times = {path: path.stat().st_mtime_ns for path in Runs(tmp_path).path.glob("*/record.json")}
    left[0] = 10**6
    whole = tuned_recipe.run(tiny_tuned(), Settings(out=tmp_path, jobs=1))
    torch.set_num_threads(threads)
    assert whole.complete
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert {one.arm: one.chosen for one in whole.plan.tuning.arms} == {
        one.arm: one.chosen for one in outcome.plan.tuning.arms
    }
    for key, record in outcome.results.records.items():
        assert whole.results.records[key].summary["weights"] == record.summary["weights"]
    assert tuned_recipe.counts(tiny_tuned(), Runs(tmp_path)) == (16 + len(whole.plan.runs),) * 2


TUNED = [name for name in recipe_names() if "tuned" in load(name).content]


@pytest.mark.full
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", TUNED)
def test_every_tuned_recipe_is_carried_out_at_smoke(name, tmp_path):
    bench = TunedRecipe(load(name), "smoke", seeds=1)
    outcome = tuned_recipe.run(bench, Settings(out=tmp_path, jobs=1))
    assert not outcome.failures, outcome.failures[0].details
    assert outcome.complete
    told = outcome.plan.tuning
    assert {len(one.trials) - one.extensions for one in told.arms} == {2}
    expected = {(subject.name, arm.name) for subject in bench.subjects for arm in bench.arms_of(subject.name)}
    assert {(one.subject, one.arm) for one in told.arms} == expected
    assert {(run.subject, run.arm.name) for run in outcome.plan.runs} >= expected
    alone = {run.arm.name for run in outcome.plan.runs} - {arm for _, arm in expected}
    assert not any(outcome.plan.arm(name).against for name in alone)
    methods = {(each.subject, each.item) for each in standings(outcome.results)}
    assert methods == {
        (s, a) for s, a in expected if bench.untuned.arm(a).kind == "method" and bench.untuned.arm(a).rule
    }
    assert all(len(bench.untuned.arm(arm).against) >= 2 for _, arm in methods)
    assert report.write(outcome, "").stat().st_size > 0


@pytest.mark.parametrize("name", TUNED)
def test_every_method_of_a_tuned_recipe_is_compared_with_its_mean_factor(name):
    for scale in load(name).content["scales"]:
        plan = load(name).plan(scale)
        for arm in plan.arms:
            if arm.kind == "method" and arm.rule is not None:
                others = [plan.arm(other) for other in arm.against if other in {each.name for each in plan.arms}]
                assert others[0].kind == "plain"
                assert [each.of for each in others if each.control in RATES] == [arm.name]


def test_a_recipe_can_draw_its_rates():
    bench = tiny_tuned(random=5)
    spaces = {arm.name: bench.space("sigmoid8", arm) for arm in bench.arms_of("sigmoid8")}
    assert {len(space.settings) for space in spaces.values()} == {5}
    assert spaces["normalised"] == spaces["mean-factor:normalised"] != spaces["plain"]
    assert all(1e-2 <= each["rate"] <= 1e1 for each in spaces["plain"].settings)


def test_what_a_tuned_recipe_cannot_have_is_refused():
    read = load(NAME)
    with pytest.raises(UsageError, match=r"'rate' is tuned by recipe .* vary another constant"):
        TunedRecipe(read, "smoke", vary={"rate": [0.1]})
    assert TunedRecipe(read, "smoke", vary={"width": [8, 16]}).subjects
    with pytest.raises(UsageError, match=r"tuned\.grit of recipe tiny: use count, extensions, grid"):
        tiny_tuned(grit=3)
    content = {**read.content, "constants": {**read.content["constants"]}}
    del content["constants"]["validation_count"]
    content["scales"] = {"reduced": read.content["scales"]["reduced"]}
    with pytest.raises(UsageError, match=r"needs the constant validation_count$"):
        TunedRecipe(Recipe("tiny", content), "reduced")


def test_the_list_counts_trials_and_runs(tmp_path):
    (entry,) = entries([NAME], tmp_path, None)
    bench = TunedRecipe(load(NAME), "full")
    assert entry["scales"]["full"]["runs"] == len(Tuner(bench).plan().runs) + len(bench.untuned.runs)
    assert entry["scales"]["full"]["finished"] == 0


# --- A task -----------------------------------------------------------------------------------------------------------

VALLEY = """
import torch
from torch import nn

def task(seed, lr=0.25):
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 3.0)
    height = lambda model: (model.weight - 1).square().sum()
    return {
        "model": model,
        "batches": [0],
        "loss": lambda model, batch: height(model),
        "metric": lambda model: {"loss": float(height(model))},
        "validation": lambda model: float(height(model)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "epochs": 1,
    }
"""


@pytest.mark.usefixtures("in_process")
def test_a_tasks_range_is_extended_and_its_draws_are_recorded(tmp_path, capsys):
    """One update of 0.5 is at the bottom: |1 - 2 lr| falls up to there."""
    path = tmp_path / "valley.py"
    path.write_text(VALLEY, encoding="utf-8")
    settings = Settings(out=tmp_path / "runs", jobs=1)
    outcome = compare.run(f"{path}:task", {"lr": "0.0625:0.125:2"}, arms=["layer-decay"], seeds=1, settings=settings)
    plain = next(one for one in outcome.plan.tuning.arms if one.arm == "plain")
    assert [trial.setting["lr"] for trial in plain.trials] == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert [trial.extension for trial in plain.trials] == [False, False, True, True, True]
    assert plain.chosen == {"lr": 0.5}
    assert plain.best.score == 0.0
    asked = ["compare", f"{path}:task", "--arms", "layer-decay", "--seeds", "1", "--jobs", "1", "--json"]
    tune = ["--tune", "lr=0.01:1", "--tune", "random:4"]
    assert cli.main([*asked, *tune, "--out", str(tmp_path / "drawn")]) == 0
    told = json.loads(capsys.readouterr().out)
    drawn = [[trial["setting"]["lr"] for trial in one["trials"]] for one in told["tuning"]["arms"]]
    assert drawn == [[each["lr"] for each in space_of({"lr": "0.01:1"}, 4).settings]] * 3
    assert cli.main([*asked, "--tune", "random:4", "--out", str(tmp_path / "none")]) == 2
    assert "tune random:4 without a range: add one, as --tune lr=1e-3:1e1" in capsys.readouterr().err


NETWORK = VALLEY.replace(
    "    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)\n    nn.init.constant_(model.weight, 3.0)\n",
    "    model = nn.Sequential(nn.Embedding(2, 1), nn.LayerNorm(1), nn.Linear(1, 1)).double()\n"
    "    for parameter in model.parameters():\n        nn.init.constant_(parameter, 3.0)\n",
).replace("(model.weight - 1).square().sum()", "sum((p - 1).square().sum() for p in model.parameters())")


@pytest.mark.usefixtures("in_process")
def test_a_search_over_roles_has_the_budget_of_every_arm(tmp_path, capsys):
    path = tmp_path / "network.py"
    path.write_text(NETWORK, encoding="utf-8")
    settings = Settings(out=tmp_path / "runs", jobs=1)
    outcome = compare.run(f"{path}:task", {"lr": "0.1:0.4:3"}, arms=["role-search"], seeds=1, settings=settings)
    assert not outcome.failures, outcome.failures[0].details
    told = {one.arm: one for one in outcome.plan.tuning.arms}
    assert {len(one.trials) - one.extensions for one in told.values()} == {3}
    for trial_ in told["role-search"].trials:
        assert set(trial_.setting["ratios"]) == {"embedding", "norm", "other"}
    record = outcome.results.records["task", "role-search", 0]
    assert record.configuration.rule == {"name": "ByRole", "ratios": told["role-search"].chosen["ratios"]}
    assert record.summary["factor"]["layers"]["0.weight"] == told["role-search"].chosen["ratios"]["embedding"]
    control = outcome.results.records["task", "mean-factor", 0]
    drawn = told["mean-factor"].chosen["ratios"]  # of the layers 0, 1 and 2, of which 1 and 2 have a bias
    assert told["mean-factor"].chosen in [dict(trial_.setting) for trial_ in told["role-search"].trials]
    mean = (drawn["embedding"] + 2 * drawn["norm"] + 2 * drawn["other"]) / 5
    assert control.configuration.rule["factors"] == {"*": pytest.approx(mean, rel=1e-6)}
    asked = ["compare", f"{path}:task", "--arms", "role-search", "--out", str(tmp_path / "none")]
    assert cli.main(asked) == 2
    assert "arm 'role-search' draws its multipliers in trials: add --tune" in capsys.readouterr().err


def test_a_search_needs_layers_of_several_roles(tmp_path):
    path = tmp_path / "valley.py"
    path.write_text(VALLEY, encoding="utf-8")
    with pytest.raises(UsageError, match=r"has layers of one role \(\w+\): leave the arm 'role-search' out"):
        compare.run(f"{path}:task", {"lr": "0.1:0.4:3"}, arms=["role-search"], settings=Settings(out=tmp_path / "runs"))


# --- The words of a verdict -------------------------------------------------------------------------------------------

PLAIN, RATE, METHOD = "plain", "mean-factor", "layer-adaptive"


def word(
    tmp_path: Path,
    values: dict[str, float],
    *,
    diverged: str = "",
    against: tuple[str, ...] = (PLAIN, RATE),
) -> str:
    """Give the word for a method whose runs, those of plain and of its mean factor end at values, with noise."""
    plan = only(table_plan(), "sgd", PLAIN, METHOD, RATE)
    arms = tuple(replace(arm, against=against if arm.name == METHOD else ()) for arm in plan.arms)
    tuning = Tuning(words="made up", quantity="validation error", seeds=(10_000,), runs=1, seconds=1.0, arms=())
    plan = replace(plan, arms=arms, columns=(), tuning=tuning)

    def value(run: Any) -> float:
        return values[run.arm.name] + (-1 if run.arm.name == METHOD else 1) * noise(run.seed)

    finish_plan(plan, tmp_path, value, diverged_at=lambda run: 3 if run.arm.name == diverged else None)
    (found,) = standings(outcome_of(plan, tmp_path, tmp_path).results)
    assert (found.item, found.subject) == (METHOD, "sgd")
    return found.word


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({PLAIN: 2.0, RATE: 1.8, METHOD: 1.0}, "helps"),
        ({PLAIN: 2.0, RATE: 1.0, METHOD: 1.0}, "a larger rate"),
        ({PLAIN: 2.0, RATE: 0.5, METHOD: 1.0}, "a larger rate"),
        ({PLAIN: 1.0, RATE: 3.0, METHOD: 2.0}, "hurts"),
        ({PLAIN: 1.0, RATE: 3.0, METHOD: 1.0}, "not shown"),
    ],
)
def test_a_method_is_one_of_four_words(tmp_path, values, expected):
    assert word(tmp_path, values) == expected


def test_nothing_is_shown_of_a_better_method_without_a_mean_factor(tmp_path):
    assert word(tmp_path, {PLAIN: 2.0, RATE: 1.8, METHOD: 1.0}, against=(PLAIN,)) == "not shown"


def test_an_arm_that_always_diverged_is_worse_than_one_that_never_did(tmp_path):
    assert word(tmp_path / "rate", {PLAIN: 2.0, RATE: 1.0, METHOD: 1.0}, diverged=RATE) == "helps"
    assert word(tmp_path / "method", {PLAIN: 2.0, RATE: 1.0, METHOD: 1.0}, diverged=METHOD) == "hurts"


def test_arms_that_were_not_tuned_have_no_word(tmp_path):
    plan = only(table_plan(), "sgd", PLAIN, METHOD, RATE)
    finish_plan(plan, tmp_path, table_value)
    assert standings(outcome_of(plan, tmp_path, tmp_path).results) == []


# --- Networks that saturate -------------------------------------------------------------------------------------------


def test_a_perceptron_is_the_one_written_by_hand():
    model = networks.build("tanh-mlp3", 5, classes=4, channels=1, width=6)
    names = [name for name, _ in model.named_parameters()]
    layers = ("hidden.0", "hidden.1", "hidden.2", "head")
    assert names == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert sum(p.numel() for p in model.parameters()) == 785 * 6 + 2 * 7 * 6 + 7 * 4
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    pixels = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    hidden = pixels.double().reshape(3, 784)
    for layer in layers[:3]:
        bound = math.sqrt(6.0 / sum(w[f"{layer}.weight"].shape))
        assert 0.8 * bound < w[f"{layer}.weight"].abs().max() <= bound
        assert not w[f"{layer}.bias"].any()
        hidden = (hidden @ w[f"{layer}.weight"].T).tanh()
    torch.testing.assert_close(model(pixels).double(), hidden @ w["head.weight"].T, rtol=1e-5, atol=1e-6)
    sigmoid = networks.build("sigmoid-mlp3", 5, classes=4, channels=1, width=6)
    assert torch.equal(sigmoid.head.weight, model.head.weight)
    assert not torch.equal(sigmoid(pixels), model(pixels))


@pytest.mark.parametrize("name", ["sigmoid-mlp0", "tanh-mlp33", "relu-mlp8"])
def test_unknown_perceptrons_are_refused(name):
    with pytest.raises(UsageError, match=f"model='{name}': use one of"):
        networks.build(name, 0, classes=10, channels=1)
    with pytest.raises(UsageError, match="activation='relu': use one of sigmoid, tanh"):
        Perceptron(0, activation="relu")


@pytest.mark.parametrize("flush", [True, False])
def test_tiny_numbers_are_zero_only_while_a_run_flushes_them(one_thread, flush):
    small, read = torch.tensor(1e-30), load(NAME)
    constants = {"data": "digits5k", "validation_count": 500, "flush_denormal": flush, "iterations": 1, "test_every": 1}
    scale = {**read.content["scales"]["smoke"], "constants": constants}
    run = Recipe("tiny", {**read.content, "scales": {"smoke": scale}}).plan("smoke").runs[0]
    made = trial.build(run.configuration)
    seen, loss = [], made.loss

    def looked(model: Any, batch: Any) -> Any:
        seen.append(bool(small * 1e-10))
        return loss(model, batch)

    made.loss = looked
    Training(made, None, run.configuration).run()
    assert seen == [not flush]
    assert bool(small * 1e-10)
