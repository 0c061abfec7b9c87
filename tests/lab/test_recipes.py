"""The recipes: every one lays out, every constant has its source, every number is the paper's, families share runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from layerwise.lab import cli
from layerwise.lab.data import FOLDER, LIBRARY
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.plan import Plan, Subject
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome, Settings, chains_left
from layerwise.lab.training import inputs, networks, solvers

PICTURE = "basodi2023-figure1"  # it has no runs
NAMES = [name for name in recipe.names() if name != PICTURE]
EVERY = [(name, scale) for name in NAMES for scale in recipe.load(name).content["scales"]]
BASODI_FIGURES = {"cifar10": (3, 4, 5, 6), "cifar100": (7, 8, 9, 10)}
COLUMNS = ("plain", "random", "G case 1", "G case 2", "G′ case 1", "G′ case 2")
TIMED = tuple(column for column in COLUMNS if column != "random")

# Typed from the paper a second time, a row a network: VGG-19, ResNet-18, -34, -50, -101.
NETWORKS = ("vgg19", "resnet18", "resnet34", "resnet50", "resnet101")
TABLE_3 = """
91.08 93.35 93.30 92.92 93.29 93.34
92.39 94.57 93.90 93.76 94.49 94.10
92.71 94.39 94.05 93.89 94.56 94.14
91.80 92.68 94.24 94.43 94.34 94.02
91.95 93.04 94.57 94.54 94.35 94.70
"""
TABLE_4 = """
65.27 66.52 69.38 68.50 69.83 69.25
71.94 72.70 75.33 75.41 76.14 75.35
72.18 73.02 74.86 75.59 75.95 75.90
72.32 73.05 77.21 77.43 76.89 76.97
73.00 73.72 77.63 77.51 77.53 77.63
"""
TABLE_1 = """
31.35 31.82 31.94 31.87 31.82
42.15 42.79 42.73 42.96 42.76
66.35 67.73 67.64 67.80 67.68
139.64 139.71 140.07 140.63 141.06
224.22 225.48 226.37 227.26 227.78
"""
TABLE_2 = """
31.62 32.55 31.92 32.16 31.83
42.08 42.83 42.24 43.44 42.19
66.64 67.00 66.99 69.84 66.88
139.32 140.64 140.21 140.68 140.79
223.88 226.35 226.28 225.09 226.12
"""


@cache
def plan_of(name: str, scale: str = "full") -> Plan:
    return recipe.load(name).plan(scale)


def identities(name: str, scale: str, seeds: int | None = None) -> set[str]:
    """Give the identities of the runs of a plan that do not wait for another run."""
    runs = (recipe.load(name).plan(scale, seeds=seeds) if seeds else plan_of(name, scale)).runs
    return {run.configuration.identity for run in runs if run.arm.control is None}


def numbers(table: str) -> dict[str, list[float]]:
    """Give the numbers of a table: network -> row."""
    rows = [[float(word) for word in line.split()] for line in table.strip().split("\n")]
    return dict(zip(NETWORKS, rows, strict=True))


def test_there_is_a_recipe_for_every_table_and_figure_of_the_papers():
    expected = {f"singh2015-{part}" for part in ("table1", "table2", "table3", "figure1", "figure2", "best")}
    expected |= {f"basodi2023-figure{number}" for number in range(2, 12)}
    expected |= {f"basodi2023-table{number}" for number in range(1, 5)}
    own = {"demo-lenet", "demo-amplification", "depth-without-normalisation", "surgical-shift"}
    own |= {"roles-in-a-transformer"}
    assert set(recipe.names()) == expected | own | {PICTURE}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_the_scales_that_it_should(name):
    scales = set(recipe.load(name).content["scales"])
    demos = {"demo-lenet": {"full"}, "demo-amplification": {"full", "digits"}}
    assert scales == demos.get(name, {"smoke", "reduced", "full"})


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_recipe_lays_out_at_every_scale(name, scale):
    plan = plan_of(name, scale)
    assert plan.runs
    assert {run.subject for run in plan.runs} == {subject.name for subject in plan.subjects}
    assert {run.arm.name for run in plan.runs} == {arm.name for arm in plan.arms}
    # An arm that a subject has is run on it, once a seed.
    expected = {(s.name, arm.name, seed) for s in plan.subjects for arm in plan.arms_of(s.name) for seed in plan.seeds}
    assert {run.key for run in plan.runs} == expected
    assert len(plan.runs) == len(expected)
    constants = [run.configuration.constants for run in plan.runs]
    for column in plan.columns:
        assert any(
            column % c.test_every == 0 and column <= c.iterations if c.iterations else column <= c.epochs
            for c in constants
        )


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_no_two_runs_of_a_plan_are_the_same_run(name, scale):
    runs = [run for run in plan_of(name, scale).runs if run.arm.control is None]
    assert len({run.configuration.identity for run in runs}) == len(runs)


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_constant_has_a_source_and_every_scale_says_what_it_needs(name, scale):
    plan, need = plan_of(name, scale), recipe.load(name).need(scale)
    for constant, (_, source) in plan.constants.items():
        assert source.strip(), constant
    for constant, entry in recipe.load(name).content["constants"].items():
        assert set(entry) == {"value", "source"}, constant
        assert entry["source"].strip(), constant
    for words in (need.data, need.time, need.memory):
        assert len(words) > 4
    assert re.search(r"second|minute|hour|day|year", need.time)
    assert plan.notes
    assert plan.claims


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_name_that_a_recipe_refers_to_exists(name, scale):
    content = recipe.load(name).content
    chosen, plan = content["scales"][scale], plan_of(name, scale)
    rows = [*content.get("arms", ()), *content.get("grids", ())]
    known_arms = {row["name"] for row in rows} | {row["group"] for row in rows if "group" in row}
    known_subjects = {row["name"] for row in content["subjects"]}
    # What is laid out at this scale, not only what the file holds: a threshold may be left out.
    present = {name for arm in plan.arms for name in (arm.name, arm.group)}
    assert set(chosen.get("arms", ())) <= present
    assert set(chosen.get("subjects", ())) <= known_subjects
    assert set(chosen.get("subject_constants", {})) <= known_subjects
    assert set(chosen.get("arm_subjects", {})) | set(chosen.get("arm_constants", {})) <= known_arms
    for row in rows:
        assert set(row.get("subjects", ())) <= known_subjects
        assert {other for other in row.get("against", ()) if "{value}" not in other} <= known_arms
        assert row.get("of", "plain") in known_arms
    for arm in plan.arms:
        assert arm.of is None or arm.of in present


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_the_paper_belongs_to_a_run_of_the_full_scale(name):
    plan = plan_of(name)
    assert len(plan.paper) == len(recipe.load(name).content.get("paper", ()))
    for row in plan.paper:
        assert row.mean is not None or row.note, row
        if plan.layout == "steps" and plan.columns:
            assert row.step in plan.columns or row.quantity


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_the_papers_numbers_stand_beside_every_scale_and_say_so(name, scale):
    plan, arms = plan_of(name, scale), recipe.load(name).plan(scale).arms
    rows = recipe.load(name).content.get("paper", ())
    compared = {name for arm in arms for name in (arm.name, arm.group)}
    shown = {subject.stands_for or subject.name for subject in plan.subjects}
    expected = [row for row in rows if row["subject"] in shown and row["arm"] in compared]
    assert sorted(row.mean or 0 for row in plan.paper) == sorted(row.get("mean", 0) for row in expected)
    assert bool(plan.paper) == bool(rows)
    same_size = scale == "full" or (name, scale) == ("singh2015-table1", "reduced")
    assert {row.label for row in plan.paper} <= {"paper" if same_size else "paper, full scale"}
    if plan.layout == "steps" and plan.columns:
        assert all(row.step in plan.columns or row.quantity for row in plan.paper)
    assert {row.quantity for row in plan.paper} <= {"", *plan.beside}
    stand_ins = [subject for subject in plan.subjects if subject.stands_for and plan.paper]
    assert sum("numbers beside" in note for note in plan.notes) == len(stand_ins)


def test_a_sweep_has_no_numbers_of_the_paper():
    assert not recipe.load("basodi2023-table3").plan("smoke", vary={"rate": [0.05, 0.1]}).paper


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_rule_optimizer_and_policy_can_be_made(name, scale):
    seen = set()
    for run in plan_of(name, scale).runs:
        constants = run.configuration.constants
        key = json.dumps([run.configuration.rule, run.configuration.trial], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        if run.arm.control is None:
            assert (rule_making.make_rule(run.configuration.rule, 3) is None) == (run.arm.rule is None)
        solvers.build(constants, torch.nn.Linear(2, 2))
        assert constants.model in networks.NETWORKS
        others = {FOLDER: "crops", LIBRARY: inputs.SYMBOLS}
        assert constants.inputs in inputs.INPUTS or constants.inputs == others.get(constants.data)


def test_the_networks_of_the_small_scales_are_built_and_read_their_inputs(one_thread):
    seen = set()
    for name, scale in EVERY:
        for run in plan_of(name, scale).runs:
            constants = run.configuration.constants
            channels = 1 if constants.inputs in ("framed", "scaled") else 3
            key = (constants.model, constants.width, channels)
            if scale == "full" or key in seen:
                continue
            seen.add(key)
            if constants.data == LIBRARY:
                sizes = {"width": constants.width, "context": constants.context}
                model = networks.build(constants.model, 0, classes=128, channels=1, **sizes)
                symbols = torch.zeros((2, constants.context), dtype=torch.int64)
                assert model(symbols).shape == (2, constants.context, 128)
                continue
            model = networks.build(constants.model, 0, classes=10, channels=channels, width=constants.width)
            side = {"lenet": 28, "alexnet": 227}.get(constants.model, 28 if "mlp" in constants.model else 32)
            assert model(torch.zeros(2, channels, side, side)).shape == (2, 10)
    papers = {"lenet", "cifar10-full", "alexnet", "vgg19", "resnet10", "resnet50"}
    assert {model for model, _, _ in seen} == papers | {f"sigmoid-mlp{depth}" for depth in (3, 4, 8)} | {
        "small-cnn",
        "gpt1",
        "gpt2",
    }


@pytest.mark.parametrize(("name", "scale"), [entry for entry in EVERY if entry[1] == "smoke"])
def test_smoke_needs_no_files(name, scale):
    assert recipe.load(name).datasets(scale) <= {"digits5k", LIBRARY}


def test_the_phases_and_the_thresholds_follow_the_kind_of_the_network():
    runs = plan_of("basodi2023-table3").runs
    for run in runs:
        rule = run.configuration.rule
        if rule is None:
            continue
        deep = run.subject in ("resnet50", "resnet101")
        assert [row[0] for row in rule["phases"]] == ([10, 100, 145, 150] if deep else [50, 100, 130, 150])
        assert [row[1] for row in rule["phases"]] == [False, True, True, False]
        assert [row[2] for row in rule["phases"] if row[1]] == [2.0, 2.0]

    def thresholds(subject: str, group: str) -> list[float]:
        found = {run.arm.value for run in runs if (run.subject, run.arm.group) == (subject, group)}
        return sorted(value for value in found if value is not None)

    for group in COLUMNS[2:]:
        for subject in NETWORKS[:3]:
            assert thresholds(subject, group) == pytest.approx([0.7 + 0.1 * step for step in range(19)])
        for subject in NETWORKS[3:]:
            assert thresholds(subject, group) == pytest.approx([1.0 + 0.25 * step for step in range(9)])
    selection = next(run for run in runs if run.arm.name == "G_prime-case2-1.7").configuration.rule["selection"]
    assert selection == {"name": "Directionality", "measure": "G_prime", "threshold": 1.7, "sides": "both"}


@pytest.mark.parametrize("scale", ["smoke", "reduced", "full"])
@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_figures_and_tables_of_one_data_set_share_their_runs(data, scale):
    figures = set[str]().union(*(identities(f"basodi2023-figure{n}", scale) for n in BASODI_FIGURES[data]))
    times, best = (f"basodi2023-table{n}" for n in ((1, 3) if data == "cifar10" else (2, 4)))
    assert identities(best, scale) == figures
    assert not identities(times, scale, seeds=1) & figures  # times are taken one run after another


@pytest.mark.parametrize("scale", ["smoke", "reduced", "full"])
def test_the_runs_of_table_2_are_those_of_figure_1_and_figure_2_shares_the_default_step_with_table_3(scale):
    assert identities("singh2015-table2", scale) < identities("singh2015-figure1", scale)
    shared = {
        run.configuration.identity
        for run in plan_of("singh2015-table3", scale).runs
        if run.subject == "every-100k" and run.arm.control is None
    }
    assert shared
    assert shared < identities("singh2015-figure2", scale)


def test_the_runs_with_one_choice_are_those_of_the_sweep_over_g():
    once = {run.configuration.identity for run in plan_of("basodi2023-figure2").runs if run.arm.group == "once a rate"}
    assert len(once) == 3 * 19 * 5
    assert once < identities("basodi2023-figure3", "full")
    reselects = {
        run.arm.group: run.configuration.rule["selection"].get("reselect")
        for run in plan_of("basodi2023-figure2").runs
        if run.arm.group
    }
    assert reselects == {"once a rate": None, "every epoch": 1, "every 2 epochs": 2, "every 5 epochs": 5}


@pytest.mark.parametrize(("name", "table"), [("basodi2023-table3", TABLE_3), ("basodi2023-table4", TABLE_4)])
def test_the_accuracies_are_the_papers_and_the_printed_gains_agree(name, table):
    paper = {(row.subject, row.arm): row for row in plan_of(name).paper}
    expected = numbers(table)
    assert len(paper) == 30
    for subject, row in expected.items():
        assert [paper[subject, column].mean for column in COLUMNS] == row
        for column, value in zip(COLUMNS[1:], row[1:], strict=True):
            assert paper[subject, column].gain == f"{value - row[0]:+.2f}"


def test_figure_11_has_training_and_testing_accuracy_of_originals_and_amplified():
    for scale in ("smoke", "reduced", "full"):
        plan = plan_of("basodi2023-figure11", scale)
        assert plan.beside == ("training_accuracy",)
        assert all(run.configuration.constants.training_accuracy for run in plan.runs)
        assert {run.arm.name for run in plan.runs} == {"plain", "G-case1-1.5", "G-case2-1.5", "to-the-end"}
        assert "CIFAR" not in plan.title + "".join(subject.words for subject in plan.subjects)
    phases = {
        (run.subject, run.arm.name): run.configuration.rule["phases"] for run in plan.runs if run.configuration.rule
    }
    assert phases["vgg19", "to-the-end"] == [[50, False, 2.0], [100, True, 2.0], [150, True, 2.0]]
    assert phases["resnet50", "to-the-end"] == [[10, False, 2.0], [100, True, 2.0], [150, True, 2.0]]
    assert phases["vgg19", "G-case1-1.5"][2:] == [[130, True, 2.0], [150, False, 2.0]]
    pairs = {(arm.name, other.name) for _, arm, other in plan.pairs()}
    assert ("G-case1-1.5", "to-the-end") in pairs
    assert not any(run.configuration.constants.training_accuracy for run in plan_of("basodi2023-figure3").runs)


@pytest.mark.parametrize(("name", "table"), [("basodi2023-table1", TABLE_1), ("basodi2023-table2", TABLE_2)])
def test_the_running_times_are_the_papers_in_seconds(name, table):
    paper = {(row.subject, row.arm): row for row in plan_of(name).paper}
    assert len(paper) == 25
    for subject, row in numbers(table).items():
        for column, minutes in zip(TIMED, row, strict=True):
            cell = paper[subject, column]
            assert cell.mean == pytest.approx(60 * minutes, abs=0.05)
            printed = re.match(r"printed: (\S+) ± (\S+) minutes", cell.note)
            assert printed is not None
            assert float(printed[1]) == minutes
            assert cell.sd == pytest.approx(60 * float(printed[2]), abs=0.05)
            if column != "plain":
                # The printed percentage is of times that were not yet rounded, and is itself cut or rounded.
                assert float(cell.gain.removesuffix(" %")) == pytest.approx(100 * (minutes / row[0] - 1), abs=0.03)


@pytest.mark.parametrize("number", range(3, 11))
def test_captioned_figures_are_not_called_inferred(number):
    plan = plan_of(f"basodi2023-figure{number}")
    assert plan.source == f"Basodi et al. 2023, Figure {number}"
    assert "caption" in plan.notes[0]
    assert any("The heading" in note for note in plan.notes) == (number == 9)
    assert any("epochs 51 to 145" in note for note in plan.notes) == (number in (5, 6, 9, 10))
    assert any("A second reading" in note for note in plan.notes) == (number in (9, 10))


def test_the_few_numbers_of_singh_that_are_left():
    paper = {(row.subject, row.arm, row.step): row.mean for row in plan_of("singh2015-figure1").paper}
    assert paper["sgd", "layer-adaptive-50k", None] == 82.08
    paper = {(row.subject, row.arm, row.step): row.mean for row in plan_of("singh2015-figure2").paper}
    assert paper["alexnet", "layer-adaptive", None] == 295000
    assert paper["alexnet", "plain", None] == 345000
    assert {row.gain for row in plan_of("singh2015-figure2").paper} == {
        "",
        f"{100 * (295 / 345 - 1):+.1f} %".replace("-", "−"),
    }
    assert {row.mean for row in plan_of("singh2015-best").paper} == {99.2}
    for name, rows in (("singh2015-table2", 24), ("singh2015-table3", 6)):
        lost = plan_of(name).paper
        assert len(lost) == rows
        assert all(row.mean is None and "lost" in row.note for row in lost)


def test_cifar10_full_is_trained_as_caffe_trains_it():
    runs = {(run.subject, run.arm.name): run.configuration for run in plan_of("singh2015-figure1").runs}
    for subject, solver, momentum in (
        ("sgd", "caffe-sgd", 0.9),
        ("nag", "caffe-nesterov", 0.9),
        ("adagrad", "caffe-adagrad", 0.0),
    ):
        plain = runs[subject, "plain"].constants
        assert (plain.data, plain.inputs, plain.order, plain.batch_size) == ("cifar10", "mean-image", "sequential", 100)
        assert (plain.solver, plain.rate, plain.momentum, plain.weight_decay) == (solver, 0.001, momentum, 0.004)
        assert (plain.policy, plain.gamma, plain.steps, plain.iterations) == ("multistep", 0.1, (60000, 65000), 70000)
        assert runs[subject, "layer-adaptive"].constants == plain
        assert runs[subject, "layer-adaptive"].apply == "lr"
    early = runs["sgd", "layer-adaptive-50k"].constants
    assert (early.steps, early.iterations) == ((50000, 55000), 60000)
    assert replace(early, steps=(60000, 65000), iterations=70000) == runs["sgd", "plain"].constants
    assert ("nag", "plain-50k") not in runs


def test_alexnet_has_the_papers_two_rates_and_the_controls_that_of_the_method():
    every = plan_of("singh2015-figure2").runs
    runs = {run.arm.name: run.configuration for run in every if run.subject == "alexnet"}
    adagrad = {run.arm.name: run.configuration.constants for run in every if run.subject == "adagrad"}
    assert adagrad.keys() == {"plain", "layer-adaptive", "mean-factor"}
    assert {(one.solver, one.momentum) for one in adagrad.values()} == {("caffe-adagrad", 0.0)}
    plain = runs["plain"].constants
    assert (plain.data, plain.inputs, plain.order, plain.batch_size) == ("imagenet", "crops", "shuffled", 256)
    assert (plain.rate, plain.momentum, plain.weight_decay) == (0.01, 0.9, 0.0005)
    assert (plain.policy, plain.stepsize, plain.gamma, plain.iterations) == ("step", 100000, 0.1, 350000)
    assert {name: configuration.constants.rate for name, configuration in runs.items()} == {
        "plain": 0.01,
        "layer-adaptive": 0.006,
        "plain-lower-rate": 0.006,
        "layer-adaptive-whole-rate": 0.01,
        "mean-factor": 0.006,
        "shuffled": 0.006,
        "frozen": 0.006,
    }
    intervals = {run.configuration.constants.stepsize for run in plan_of("singh2015-table3").runs}
    assert max(intervals) == 100000
    assert len(intervals) == 3
    reduced = {run.arm.name: run.configuration.constants.rate for run in plan_of("singh2015-figure2", "reduced").runs}
    for name, rate in reduced.items():
        assert rate / reduced["plain"] == pytest.approx(runs[name].constants.rate / 0.01)


def test_the_original_without_weight_decay_differs_in_that_alone():
    runs = {run.arm.name: run.configuration for run in plan_of("basodi2023-figure3").runs if run.subject == "resnet18"}
    assert runs["plain"].constants.weight_decay == 5e-4
    assert replace(runs["plain-no-decay"].constants, weight_decay=5e-4) == runs["plain"].constants


def test_a_method_is_compared_with_the_plain_arm_and_with_the_controls_at_its_own_threshold():
    pairs = {(arm.name, other.name) for _, arm, other in plan_of("basodi2023-figure4").pairs()}
    assert {("G_prime-case1-1.5", other) for other in ("plain", "random", "all", "shuffled-G_prime-1.5")} <= pairs
    assert {arm for arm, _ in pairs if arm.startswith("G")} == {"G_prime-case1-1.5", "G_prime-case2-1.5"}


@pytest.mark.parametrize("name", ["basodi2023-table3", "basodi2023-table4", "basodi2023-figure11"])
def test_the_comparisons_are_few_enough_to_show_what_the_paper_claims(name):
    """Holm over m comparisons of n seeds needs a mean of t(n - 1; 1 - 0.025 / m) / sqrt(n) of its sd, at most."""
    from scipy.special import stdtrit

    plan = plan_of(name)
    count = len(list(plan.pairs()))
    needed = float(stdtrit(len(plan.seeds) - 1, 1 - 0.025 / count)) / len(plan.seeds) ** 0.5
    assert needed * 0.35 < 2.0  # points, at a generous sd of the paired differences; the gains are 1.2 to 5.1


def test_kinds_of_subjects_choose_values_and_a_sweep_keeps_them():
    plan = recipe.load("basodi2023-table3").plan("smoke", vary={"weight_decay": [0.001, 0.002]})
    assert len(plan.subjects) == 6
    assert all(subject.kind in ("simple", "deep") for subject in plan.subjects)
    whole = {run.key[:2] for run in plan.runs}
    for subject, arm in itertools.product(plan.subjects, plan.arms):
        assert ((subject.name, arm.name) in whole) == (arm in plan.arms_of(subject.name))
    # The sixteen arms that are restricted to kinds keep the subjects that the sweep has made of them.
    full = recipe.load("basodi2023-table3").plan("full", seeds=1, vary={"batch_size": [64, 256]})
    arm = full.arm("G-case1-0.7")
    assert set(arm.subjects) == {f"{name} batch_size={size}" for name in NETWORKS[:3] for size in (64, 256)}


def test_an_arm_that_no_subject_of_a_scale_has_is_left_out():
    content = dict(recipe.load("singh2015-figure1").content)
    content["scales"] = {"smoke": {**content["scales"]["smoke"], "subjects": ["nag"]}}
    plan = recipe.Recipe("made up", content).plan("smoke")
    assert not {arm.name for arm in plan.arms} & {"plain-50k", "layer-adaptive-50k"}
    assert {run.subject for run in plan.runs} == {"nag"}


def test_a_kind_that_a_table_lacks_is_refused():
    content = dict(recipe.load("basodi2023-figure5").content)
    content["subjects"] = [{**row, "kind": "odd"} for row in content["subjects"]]
    with pytest.raises(UsageError, match="kind='odd' of a subject: use one of simple, deep"):
        recipe.Recipe("made up", content).plan("full")


def test_a_scale_restricts_a_control_to_some_subjects():
    arm = plan_of("singh2015-table2", "reduced").arm("mean-factor")
    assert arm.subjects == ("sgd",)
    assert plan_of("singh2015-table2").arm("mean-factor").subjects == ()


def part(plan: Plan, subject: str, names: tuple[str, ...]) -> Plan:
    """Keep some arms of one subject, so that the test is short."""
    kept: tuple[Subject, ...] = (plan.subject(subject),)
    runs = tuple(run for run in plan.runs if run.subject == subject and run.arm.name in names)
    return replace(plan, subjects=kept, arms=tuple(arm for arm in plan.arms if arm.name in names), runs=runs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "subject", "names"),
    [
        ("singh2015-figure1", "sgd", ("layer-adaptive", "shuffled", "layer-adaptive-50k")),
        ("singh2015-figure2", "alexnet", ("layer-adaptive", "mean-factor")),
        ("basodi2023-figure4", "narrow-vgg19", ("random", "shuffled-G_prime-1.5", "G_prime-case2-0.7")),
    ],
)
def test_a_part_of_a_smoke_scale_is_carried_out(name, subject, names, carried_out: Callable[..., Outcome]):
    outcome = carried_out(part(plan_of(name, "smoke"), subject, names))
    assert outcome.complete
    assert not any(record.diverged for record in outcome.results.records.values())
    assert {cell.count for arm in names for cell in outcome.results.cells(subject, arm) if cell is not None} == {1}
    chosen = [record.summary["selections"] for record in outcome.results.records.values()]
    assert any(chosen) == name.startswith("basodi2023")


def test_times_are_those_that_the_reproductions_were_measured_to_take():
    text = (Path(__file__).parents[2] / "docs" / "reproductions" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"layerwise run (\S+) --scale (\S+) .*\| ([\d.]+ hours of a busy core) \|", text)
    assert len(rows) >= 3
    for name, scale, measured in rows:
        assert measured in recipe.load(name).need(scale).time, name


def test_arguments_of_rules_and_choices_are_varied():
    vary = {"factor": [1.5, 3], "kinds": ["conv", "conv+fc"], "ratio": [0.1]}
    plan = recipe.load("demo-amplification").plan("digits", seeds=1, vary=vary)
    assert len(plan.subjects) == 4
    runs = {(run.subject.partition(" ")[2], run.arm.name): run.configuration for run in plan.runs}
    rule = runs["factor=3 kinds=conv+fc ratio=0.1", "random"].rule
    assert rule["selection"] == {"name": "RandomLayers", "ratio": 0.1, "after_analysis": True, "kinds": ["conv", "fc"]}
    assert {factor for _, amplified, factor in rule["phases"] if amplified} == {3}
    chosen = [each for (subject, _), each in runs.items() if subject == "factor=1.5 kinds=conv ratio=0.1"]
    assert all("ratio" not in each.rule["selection"] for each in chosen if each.rule and "measure" in str(each.rule))
    assert len({each.name for (_, arm), each in runs.items() if arm == "plain"}) == 1
    assert len({each.name for (_, arm), each in runs.items() if arm == "random"}) == 4


def test_the_set_up_is_drawn_without_a_run(tmp_path, capsys):
    asked = ["run", PICTURE, "--out", str(tmp_path)]
    assert cli.main([*asked, "--figures"]) == 0
    page, said = tmp_path / PICTURE / "report.html", capsys.readouterr().out
    for words in (
        "learning rate: rate 0.1 in 1 to 100, rate 0.01 in 101 to 150.",
        "VGG-19, ResNet-18, ResNet-34: plain in 1 to 50, analysed in 51, amplified × 2 in 52 to 100, analysed in 101, "
        "amplified × 2 in 102 to 130, plain in 131 to 150.",
        "ResNet-50, ResNet-101: plain in 1 to 10, analysed in 11, amplified × 2 in 12 to 100, analysed in 101, "
        "amplified × 2 in 102 to 145, plain in 146 to 150.",
    ):
        assert words in said
        assert words in page.read_text()
    assert said.endswith(f"Report: {page}\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        PICTURE, "figures", "files.json", "report.html", "set-up.png", "set-up.svg"
    ]  # fmt: skip
    for command in ([*asked, "--scale", "full"], ["sweep", PICTURE, "--vary", "rate=1"], ["estimate", PICTURE]):
        assert cli.main(command) == 2
        assert "is a picture without runs" in capsys.readouterr().err
    assert cli.main(["list", PICTURE, "--out", str(tmp_path)]) == 0
    assert f"run {PICTURE}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    ["--seeds=0", "--jobs=0", "--threads=0", "--device=abacus", "--data-dir=none"],
)
def test_settings_that_no_run_could_have_are_refused_of_a_picture_too(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", PICTURE, option]) == 2
    name, _, value = option.removeprefix("--").partition("=")
    assert re.search(f"{name}='?{value}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", [False, True])
def test_a_report_of_a_picture_says_where_its_page_is(tmp_path, capsys, inside):
    assert cli.main(["run", PICTURE, "--out", str(tmp_path)]) == 0
    own = tmp_path / PICTURE
    capsys.readouterr()
    assert cli.main(["report", str(own if inside else tmp_path), "--out", str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert f"holds no experiment (plan.json), but a picture without runs: its page is {own / 'report.html'}" in said
    assert "writes its plan" not in said
    (tmp_path / "store").mkdir()  # of an experiment of which no run is finished
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "again")]) == 2
    assert "start the experiment's command again" in capsys.readouterr().err


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_that_normalise_over_the_batch_are_known_by_their_names(name):
    width = {"alexnet": 0.0625, "cifar10-full": None, "cifar10-quick": None, "lenet": None}.get(name, 8)
    model = networks.build(name, 0, classes=10, channels=3, width=width)
    has = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert has == name.startswith(networks.WITH_BATCH_NORMALISATION)


def test_runs_that_a_varied_argument_does_not_change_are_done_once():
    plan = recipe.load("demo-lenet").plan("full", seeds=1, vary={"log_base": [2, 10]})
    chains = chains_left(plan, Results(plan), Settings())
    names = [tuple(run.configuration.name for run in chain.runs) for chain in chains]
    assert len(names) == len(set(names)) < len(plan.chains())
    assert {name for chain in names for name in chain} == {run.configuration.name for run in plan.runs}


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({"ratio": [1.5]}, "ratio=1.5"),
        ({"kinds": ["conv+cone"]}, "cone"),
        ({"factor": ["much"]}, "much"),
        ({"facto": [2]}, "unknown constant 'facto'.*arguments of its rules: .*factor.*Did you mean factor?"),
        ({"seed": [2]}, "unknown constant 'seed'"),
        ({"measure": ["G"]}, "'measure' tells the arms of this recipe apart"),
    ],
)
def test_wrong_arguments_of_rules_are_refused_by_one_line(vary, words):
    with pytest.raises(UsageError, match=words) as caught:
        recipe.load("demo-amplification").plan("digits", seeds=1, vary=vary)
    assert "\n" not in str(caught.value)
