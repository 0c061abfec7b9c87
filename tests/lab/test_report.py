"""The page, its tables and figures, from runs that are made up and written as the engine writes them."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import polars
import pytest
from made_up import (
    SWEEP_LAYERS,
    TABLE_STEPS,
    finish,
    finish_plan,
    outcome_of,
    sweep_plan,
    sweep_selections,
    sweep_value,
    table_plan,
    table_value,
)

from layerwise.lab import printing, report
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import PaperValue, quantity_of
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.experiments.results import Results
from layerwise.lab.report import anything, charts, files, layers, maps, sweeps
from layerwise.lab.report.drawing import Drawing, shortened, slugs
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import best_of, sheet
from layerwise.lab.report.looks import COLOURS, looks
from layerwise.lab.report.page import build
from layerwise.lab.report.verdicts import verdicts
from layerwise.lab.runs.folder import Runs

HOSTILE = '"><script>alert("x")</script>\x1b[31m'


class Checker(HTMLParser):
    """Keeps the addresses, the ids and the open elements of a page."""

    VOID = frozenset({"meta", "link", "line", "rect", "circle", "path", "br", "stop", "input"})

    def __init__(self):
        super().__init__()
        self.addresses, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def table_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    finish_plan(table_plan(), out, table_value, steps=TABLE_STEPS)
    return out


@pytest.fixture(scope="module")
def sweep_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    more = {"layers": SWEEP_LAYERS, "selections": sweep_selections, "quantity": "accuracy"}
    finish_plan(sweep_plan("best"), out, sweep_value, seconds=lambda run: 10.0 + run.seed, **more)
    return out


@pytest.fixture
def table(table_runs, tmp_path):
    return outcome_of(table_plan(), table_runs, tmp_path)


@pytest.fixture
def sweep(sweep_runs, tmp_path):
    return outcome_of(sweep_plan("best"), sweep_runs, tmp_path)


@pytest.fixture(scope="module")
def table_page(table_runs, tmp_path_factory):
    return build(
        outcome_of(table_plan(), table_runs, tmp_path_factory.mktemp("page")), "layerwise run singh2015-table1"
    )


@pytest.fixture(scope="module")
def sweep_page(sweep_runs, tmp_path_factory):
    return build(outcome_of(sweep_plan("best"), sweep_runs, tmp_path_factory.mktemp("page")), "layerwise run x")


def hostile_outcome(runs, tmp_path):
    """Give an outcome in which every string of a person or a file is hostile."""
    outcome = outcome_of(table_plan(), runs, tmp_path, interrupted=True, failures=[Failure("a", HOSTILE, HOSTILE)])
    plan = outcome.plan
    subjects = tuple(replace(subject, words=f"{subject.words} {HOSTILE}") for subject in plan.subjects)
    arms = tuple(replace(arm, words=f"{arm.words} {HOSTILE}") for arm in plan.arms)
    named = {"title": HOSTILE, "source": HOSTILE, "notes": (HOSTILE,), "claims": (HOSTILE,), "data_title": HOSTILE}
    constants = {HOSTILE: (HOSTILE, HOSTILE)}
    outcome.plan = replace(plan, subjects=subjects, arms=arms, constants=constants, **named)
    outcome.results.plan = outcome.plan
    for key, record in outcome.results.records.items():
        about = {**record.about, "hardware": {"processor": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
        outcome.results.records[key] = replace(record, about=about)
    del outcome.results.records["sgd", "plain", 0]
    outcome.skipped.append(HOSTILE)
    return outcome


@pytest.mark.parametrize("name", ["table_page", "sweep_page"])
def test_the_page_asks_the_network_for_nothing(name, request):
    html = request.getfixturevalue(name).html
    checker = Checker()
    checker.feed(html)
    assert set(checker.addresses) <= {"data:,"}
    assert not re.search(r"https?:|//cdn|@import|fetch\(|<script|url\((?!#)", html)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert len(html.encode()) < 3_000_000


@pytest.mark.parametrize("name", ["table_page", "sweep_page"])
def test_the_page_is_well_formed_and_ids_are_unique(name, request):
    checker = Checker()
    checker.feed(request.getfixturevalue(name).html)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_the_page_of_a_table_holds_all_its_parts(table_page):
    html = table_page.html
    for words in (
        "layer-adaptive is shown to have a lower test error than plain with 3 of 3 (SGD, NAG and AdaGrad)",
        "In none of these is it shown to be more than the controls give.",
        "It beats plain but not plain at the mean factor",
        "paper",
        "3.29",
        "Learning curves",
        "Training loss",
        "Gradient norm",
        "Update to weight",
        "Between layers",
        "What the paper says",
        "layerwise run singh2015-table1",
        "431,080 parameters in 3 layers",
        "the first 2,000 iterations",
        "Caveats",
        "5 seeds: small differences need more.",
        "prefers-color-scheme: dark",
    ):
        assert words in html
    assert "nan" not in re.sub(r"<[^>]*>", "", html).lower()
    # Three differences, errors and losses; maps of four quantities for three subjects and two arms with a rule.
    assert len(re.findall(r'<svg role="img"', html)) == 9 + 4 * 3 * 2 == len(table_page.figures)


def test_the_page_of_thresholds_holds_all_its_parts(sweep_page):
    html = sweep_page.html
    for words in (
        "G case 1",
        "Accuracy by threshold",
        "How many layers were chosen",
        "Which layers were chosen",
        "layer1.conv1",
        "best of 3 values",
        "best of 3 plain runs beside best of 3 values: the more values, the higher their best by chance alone",
        "the paper",
        "lost",
        "In 40 of 120 choices no layer passed the threshold",
        "one arm of each group",
        "picked by the test images",
    ):
        assert words in html
    names = {figure.name for figure in sweep_page.figures}
    assert {"thresholds-one", "chosen-one", "chosen-layers-one-g-1-5", "accuracy-two", "factor-one-all"} <= names


def test_hostile_strings_are_escaped(table_runs, tmp_path):
    outcome = hostile_outcome(table_runs, tmp_path)
    path = report.write(outcome, f"layerwise --out {HOSTILE}")
    html = path.read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#34;x&#34;)") > 30
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    text = (outcome.folder / "table.md").read_text()
    assert "<script" not in text
    assert "\\|" not in re.sub(r"^\|.*\|$", "", text, flags=re.M).split("## Verdict")[0]
    for figure in (outcome.folder / "figures").glob("*.svg"):
        assert "<script" not in figure.read_text()
        assert "\x1b" not in figure.read_text()


def test_everything_is_written(table, tmp_path):
    path = report.write(table, "layerwise run singh2015-table1")
    assert path == table.report == table.folder / "report.html"
    assert (tmp_path / "report.html").read_bytes() == path.read_bytes()
    figures = sorted(each.name for each in (table.folder / "figures").iterdir())
    assert len(figures) == 2 * 33
    svg = (table.folder / "figures" / "test_error-sgd.svg").read_text()
    assert svg.startswith("<svg xmlns=")
    assert "var(--" not in svg
    assert "layer-adaptive" in svg
    png = (table.folder / "figures" / "factor-sgd-layer-adaptive.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") > 600
    frame = polars.read_parquet(table.folder / "tables" / "table.parquet")
    assert frame.height == 3 * 3 * 4
    metrics = polars.read_parquet(table.folder / "tables" / "metrics.parquet")
    assert set(metrics["seed"].unique()) == set(range(5))
    comparisons = polars.read_parquet(table.folder / "tables" / "comparisons.parquet")
    assert comparisons.height == 3 * 2 * 4 == len(table.results.comparisons())
    assert set(comparisons.filter(polars.col("step") == 1800)["pairs"]) == {5}
    text = (table.folder / "table.md").read_text()
    assert "paper 3.29 ± 0.22" in text
    assert "It beats plain but not plain at the mean factor" in text


def test_one_run_and_no_run_make_a_page(table, tmp_path):
    key = ("sgd", "plain", 0)
    table.results.records = {key: table.results.records[key]}
    html = report.write(table, "").read_text()
    assert "1 of 45 runs are finished" in html
    assert "too few runs are finished" in html
    table.results.records = {}
    assert "No run is finished yet." in report.write(table, "").read_text()


def test_an_interrupted_experiment_says_what_is_missing(table):
    table.interrupted = True
    table.failures = [Failure("nag plain seed 1", "nag plain seed 1", "the disk is full")]
    del table.results.records["nag", "plain", 1]
    html = build(table, "").html
    assert "Interrupted: 44 of 45 runs are finished." in html
    assert "nag plain seed 1 failed: the disk is full." in html
    assert "(4 of 5 runs)" in html


def test_diverged_runs_are_counted_and_have_no_number(table):
    record = table.results.records["sgd", "mean-factor", 0]
    broken = replace(record, summary={**record.summary, "diverged_at": 3})
    table.results.records["sgd", "mean-factor", 0] = broken
    html = build(table, "").html
    assert "(1 of 5 diverged)" in html
    assert "1 runs diverged" in html


def test_the_table_holds_means_and_the_distance_to_the_paper(table):
    made = sheet(table.results)
    assert made.columns == ("600", "1,000", "1,400", "1,800")
    title, rows = made.sections[0]
    assert title == "SGD"
    last = rows[0].entries[-1]
    values = [table_value(run) for run in table.plan.runs if run.subject == "sgd" and run.arm.name == "plain"]
    assert last.text == f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert last.lines == (("paper", "1.52 ± 0.09"),)
    assert last.off == pytest.approx((statistics.fmean(values) - 1.52) / 0.09)
    assert last.off_words == "−0.2 sd"
    assert not last.best
    assert rows[1].entries[-1].best or rows[2].entries[-1].best


def test_one_seed_has_no_spread_and_of_equal_means_none_is_best(table_runs, tmp_path):
    outcome = outcome_of(table_plan(seeds=1), table_runs, tmp_path)
    assert sheet(outcome.results).lead.startswith("test error in %, of one seed, after")
    (_, rows), *_ = sheet(outcome.results).sections
    assert [row.entries[-1].best for row in rows].count(True) == 1
    for key, record in list(outcome.results.records.items()):
        plain = outcome.results.records[key[0], "plain", 0]
        outcome.results.records[key] = replace(record, folder=plain.folder)
    outcome = replace(outcome, results=type(outcome.results)(outcome.plan, outcome.results.records))
    (_, rows), *_ = sheet(outcome.results).sections
    assert len({row.entries[-1].main for row in rows}) == 1
    assert not any(one.best for row in rows for one in row.entries)


def test_the_papers_numbers_beside_a_smaller_scale_say_so_and_have_no_distance(table):
    table.results.plan = replace(table.plan, paper=tuple(replace(row, full_scale=True) for row in table.plan.paper))
    last = sheet(table.results).sections[0][1][0].entries[-1]
    assert last.lines == (("paper, full scale", "1.52 ± 0.09"),)
    assert last.off is None
    assert "paper, full scale" in build(table, "").html


def test_other_quantities_are_tabled_and_compared_below_the_plans_own(table):
    paper = (PaperValue(subject="sgd", arm="layer-adaptive", mean=295000, gain="−14.5 %", quantity="reach 60"),)
    beside = ("test_loss", "reach 60", "best_accuracy")
    results = Results(replace(table.plan, columns=(1000, 1800), beside=beside, paper=paper), table.results.records)
    for key in results.records:
        early = 60.0 if key[1] == "layer-adaptive" else 50.0
        results._series[key, "accuracy"] = [(0, 99.0), (600, early), (1000, 60.0 + key[2]), (1800, 58.0)]
        results._series[key, "test_loss"] = [
            (1000, 0.5),
            (1800, 0.3 if early == 50.0 else 0.32 + 0.001 * key[2]),
        ]
    made = sheet(results)
    assert [title for title, _ in made.sections[::3]] == [
        "SGD",
        "SGD: test loss, nats",
        "SGD: number of iterations until 60 % accuracy",
        "SGD: best accuracy, %",
    ]
    sections = {title: {row.words: row.entries for row in rows} for title, rows in made.sections}
    loss = sections["SGD: test loss, nats"]
    assert [one.main for one in loss["plain"]] == ["0.5", "0.3"]
    reached = sections["SGD: number of iterations until 60 % accuracy"]
    assert [one.text for one in reached["plain"]] == ["", "1,000 ± 0"]
    assert [one.text for one in reached["layer-adaptive"]] == ["", "600 ± 0"]
    assert reached["layer-adaptive"][1].lines == (("paper", "295,000 (−14.5 %)"),)
    told = "SGD, number of iterations until 60 % accuracy (−40.0 %): no difference shown between layer-adaptive"
    assert any(note.startswith(told) and "every pair differs by the same amount" in note for note in made.notes)
    told = "SGD, test loss: layer-adaptive has a higher test loss than plain (+0.02"
    assert any(note.startswith(told) for note in made.notes)
    best = sections["SGD: best accuracy, %"]["plain"][1]
    assert best.main == "62.00"  # the mean of 60 to 64; 99 was before the first update
    rows = results.table()
    assert rows["quantity"].unique(maintain_order=True).to_list() == [
        "test_error",
        "test_loss",
        "number of iterations until 60 % accuracy",
        "best accuracy",
    ]
    assert [quantity_of(name).level for name in beside] == [0.0, 60.0, 0.0]
    with pytest.raises(UsageError, match=r"quantity='reach far': use one of test_error, .*, or 'reach 57\.5'"):
        replace(table.plan, beside=("reach far",))


def test_a_level_that_is_never_reached_has_no_number(table):
    results = Results(replace(table.plan, beside=("reach 99.5",)), table.results.records)
    for key in results.records:
        results._series[key, "accuracy"] = [(0, 99.9), (1800, 99.4)]
    (_, rows) = sheet(results).sections[-1]
    assert {one.text for row in rows for one in row.entries} == {"", "–"}


def test_values_of_the_paper_without_a_cell_are_listed(table):
    few = replace(table.plan, columns=(1800,))
    table.results.plan = few
    notes = sheet(table.results).notes
    assert len(notes) == 18
    assert "Paper, SGD, plain after iteration 600: 3.29 ± 0.22" in notes


def test_the_best_of_several_runs_is_the_mean_over_all_choices(sweep):
    quantity = sweep.plan.quantity
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    for count in (1, 2, 3, 5):
        slow = [max(chosen) for chosen in combinations(values, count)]
        assert best_of(values, count, quantity) == pytest.approx(sum(slow) / len(slow))
    assert best_of(values, 9, quantity) == 9.0
    falling = replace(quantity, higher_is_better=False)
    assert best_of(values, 2, falling) == pytest.approx(
        statistics.fmean(min(chosen) for chosen in combinations(values, 2))
    )
    assert best_of(list(map(float, range(60))), 30, quantity) == 59.0


def test_the_table_of_bests_shows_the_papers_way_beside_the_mean(sweep):
    made = sheet(sweep.results)
    assert made.columns == ("plain", "every layer", "G case 1", "G′ case 1")
    (_, rows) = made.sections[0]
    plain, _, group, _ = rows[0].entries
    runs = {(run.arm.name, run.seed): sweep_value(run) for run in sweep.plan.runs if run.subject == "one"}
    ways = [max(runs[f"G-{value}", seed] for value in ("0.7", "1.5", "2.5")) for seed in range(5)]
    assert group.main == f"{statistics.fmean(runs['G-1.5', seed] for seed in range(5)):.2f}"
    assert dict(group.lines) == {"at": "1.5", "best of 3 values": f"{statistics.fmean(ways):.2f}", "paper": "93.90"}
    slow = [max(chosen) for chosen in combinations([runs["plain", seed] for seed in range(5)], 3)]
    assert dict(plain.lines)["best of 3 runs"] == f"{statistics.fmean(slow):.2f}"
    assert made.notes == ("lost: the table is cut",)


def test_the_table_of_thresholds_has_a_column_for_each_value(sweep_runs, tmp_path):
    plan = replace(sweep_plan("best"), layout="thresholds")
    made = sheet(outcome_of(plan, sweep_runs, tmp_path).results)
    assert made.columns == ("none", "0.7", "1.5", "2.5", "paper's best")
    plain, _, group, _ = made.sections[0][1]
    assert [one.text for one in plain.entries[1:]] == [""] * 4
    assert [one.best for one in group.entries] == [False, False, True, False, False]
    assert group.entries[-1].main == "93.90"


def test_the_table_of_times_is_relative_to_plain(sweep_runs, tmp_path):
    plan = replace(sweep_plan("best"), layout="times")
    paper = tuple(replace(row, gain="+0.05 %" if row.arm == "G case 1" else "") for row in plan.paper)
    plan = replace(plan, quantity=sweep_plan("times", "seconds").quantity, paper=paper)
    outcome = outcome_of(plan, sweep_runs, tmp_path)
    record = outcome.results.records["one", "all", 0]
    outcome.results.records["one", "all", 0] = replace(record, summary={**record.summary, "seconds": 13.0})
    (_, rows) = sheet(outcome.results).sections[0]
    assert rows[0].entries[0].text == "12.0 ± 1.6"
    # Seed 0 takes 12 s without the tests instead of 10, the others as long as plain: a mean of 4 %.
    assert rows[0].entries[1].text == f"+4.0 % ± {statistics.stdev([20.0, 0, 0, 0, 0]):.1f}"
    assert dict(rows[0].entries[2].lines)["paper"] == "+0.05 %"
    assert "Running time" in build(outcome, "").html


def test_a_group_is_never_said_to_be_better_than_at_the_values_where_it_is(sweep):
    (group,) = [
        verdict for verdict in verdicts(sweep.results) if (verdict.subject, verdict.item) == ("one", "G case 1")
    ]
    assert group.beats_plain == ("1.5",)
    assert group.does_worse == ("2.5",)
    assert group.beats_all == ("1.5",)
    assert group.conclusion == (
        "Of 3 values, it beats plain at 1.5 and it does worse at 2.5. It beats the controls too at 1.5."
    )
    words = headline(sweep)
    assert (
        "2 of 6 (G case 1 (ResNet-10) at 1 of 3 values and G case 1 (ResNet-10, wider) at 1 of 3 values) are" in words
    )
    assert "In 2 of these it is shown to be more than every control gives." in words


def test_the_headline_claims_no_more_than_is_shown(table):
    same = table.results.records["sgd", "plain", 0]
    for key in table.results.records:
        table.results.records[key] = replace(same, configuration=table.results.records[key].configuration)
    words = headline(table)
    assert words == (
        "After iteration 1,800, layer-adaptive is not shown to have a lower test error than plain with any of SGD, NAG "
        "and AdaGrad."
    )
    table.plan = replace(table.plan, seeds=(0, 1))
    table.results.plan = table.plan
    del table.results.__dict__["_judged"]
    words = "After iteration 1,800, 2 seeds are too few to tell whether the test error differs; 5 are needed."
    assert headline(table) == words


def test_a_long_series_is_averaged_in_spans_as_a_slow_reference_does(table, monkeypatch):
    monkeypatch.setattr(charts, "POINTS", 10)
    monkeypatch.setattr(charts, "SPANS", 4)
    found = charts.curve(table.results, "sgd", "plain", "training_loss")
    slow = {}
    for seed in range(5):
        pairs = table.results.records["sgd", "plain", seed].series("training_loss")
        for begin, end in pairwise((0, 5, 10, 15, 20)):
            slow.setdefault(end, []).append(statistics.fmean(v for step, v in pairs if begin < step <= end))
    assert [cell.step for cell in found] == [5, 10, 15, 20]
    for cell in found:
        assert cell.mean == pytest.approx(statistics.fmean(slow[cell.step]))
        assert cell.count == 5


def test_a_curve_leaves_out_what_was_measured_before_the_first_update(table):
    steps = [cell.step for cell in charts.curve(table.results, "sgd", "plain", "test_error")]
    assert steps == [200, 600, 1000, 1400, 1800]


def test_a_grid_averages_over_seeds_and_neighbouring_steps(table):
    found = maps.grid(table.results, "sgd", "layer-adaptive", "gradient_norm")
    assert found.ends == (1, 10, 20)
    assert found.values["conv2"] == pytest.approx([10**1.9, 10.0, 1.0])
    found = maps.grid(table.results, "sgd", "layer-adaptive", "gradient_norm", 2)
    assert found.ends == (10, 20)
    assert found.values["conv2"] == pytest.approx([(10**1.9 + 10.0) / 2, 1.0])
    assert maps.grid(table.results, "sgd", "plain", "factor") is None


def test_a_scale_colours_its_ends_and_chooses_logarithms():
    linear = maps.Scale.of([1.0, 2.0, 3.0])
    assert not linear.log
    assert [linear.colour(v) for v in (1.0, 2.0, 3.0)] == [maps.VIRIDIS[0], maps.VIRIDIS[10], maps.VIRIDIS[-1]]
    wide = maps.Scale.of([0.0, 1e-3, 1.0])
    assert wide.log
    assert wide.low == 1e-3
    assert wide.colour(0.0) == maps.VIRIDIS[0]
    assert wide.colour(math.sqrt(1e-3)) == maps.VIRIDIS[10]
    assert maps.Scale.of([2.0, 2.0]).words == ("2", "2 everywhere")
    assert maps.Scale.of([]).colour(0.0) in maps.VIRIDIS


def test_a_heat_map_covers_every_cell_once(table):
    data = maps.grid(table.results, "sgd", "layer-adaptive", "rate")
    drawn = maps.heat_map(data, maps.Scale.of(data.finite), "x", "Rate")
    strokes = re.findall(r'<path stroke="(#\w+)" d="([^"]+)"', drawn.body)
    length = sum(
        float(end) - float(begin) for _, d in strokes for begin, end in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", d)
    )
    assert length == pytest.approx(maps.WIDTH * 3)
    assert len(strokes) == 3  # each layer has its own constant rate
    for layer in ("conv1", "conv2", "ip1"):
        assert f">{layer}</text>" in drawn.body


def test_the_chosen_layers_are_counted_and_marked(sweep):
    assert sweeps.chosen_counts(sweep.results, "one", "G-0.7") == [3] * 10
    assert sweeps.chosen_counts(sweep.results, "one", "G-2.5") == [0] * 10
    drawn, left_out = maps.choices(sweep.results, "one", "G-0.7", "x", "Choices")
    assert drawn.body.count("<circle") == 3 * 10
    assert left_out == ""
    drawings, _ = layers.chosen_maps(sweep.results)
    assert [title for title, _ in drawings] == [
        f"{subject}: {group}, 1.5"
        for subject in ("ResNet-10", "ResNet-10, wider")
        for group in ("G case 1", "G′ case 1")
    ]


def test_many_choices_are_thinned_and_said_so(sweep, monkeypatch):
    monkeypatch.setattr(maps, "MOST_COLUMNS", 4)
    _, left_out = maps.choices(sweep.results, "one", "G-0.7", "x", "Choices")
    assert left_out == "the first 2 of 5 seeds"


def test_arms_are_told_apart_by_colour_dash_and_shape(sweep):
    shown = looks(sweep.plan)
    assert list(shown) == ["plain", "all", "G case 1", "G′ case 1"]
    assert shown["plain"].variable == "plain"
    for part in ("variable", "dash", "shape", "key"):
        assert len({getattr(look, part) for look in shown.values()}) == 4
    many = replace(sweep.plan, arms=tuple(replace(sweep.plan.arms[1], name=str(n), words=str(n)) for n in range(24)))
    assert len({(look.variable, look.dash, look.shape) for look in looks(many).values()}) == 24


def test_colours_of_arms_stand_out_from_their_card():
    for name in ("plain", *(f"c{number}" for number in range(1, 9))):
        for side in (0, 1):
            assert contrast(COLOURS[name][side], COLOURS["card"][side]) >= 3.0, (name, side)


def contrast(one, other):
    """Compute WCAG's contrast of two colours."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_names_of_files_are_unique_and_harmless():
    names = slugs(["a/b", "a b", "../..", "", "x" * 300])
    assert names["a/b"] == "a-b"
    assert names["a b"] == "a-b-2"
    assert all(re.fullmatch(r"[a-z0-9-]{1,44}", name) for name in names.values())
    assert len(set(names.values())) == 5


def test_long_and_broken_names_can_be_drawn():
    assert shortened("encoder.layers.11.attention.output", 15) == "encoder….output"
    assert printing.shown("a\x00b\ud800") == r"a\x00b\ud800"
    drawn = Drawing("x", "a \x00 < b", 100, 50, "", scale=("#000000, #ffffff", "0", "1"))
    assert drawn.png.startswith(b"\x89PNG")
    assert "&lt;" in drawn.inline


def test_markdown_signs_are_escaped():
    assert files.escaped("a|b *c* <i> [d](e)\nf") == r"a\|b \*c\* &#60;i&#62; \[d\](e) f"


def test_any_folders_make_a_report(table_runs, tmp_path):
    outcome = anything.gather([table_runs], tmp_path)
    plan = outcome.plan
    assert outcome.complete
    assert {subject.name for subject in plan.subjects} == {"adagrad", "nag", "sgd"}
    assert {arm.name: (arm.control, arm.of) for arm in plan.arms} == {
        "plain": (None, None),
        "layer-adaptive": (None, None),
        "mean-factor": ("mean factor", "layer-adaptive"),
    }
    assert plan.arm("layer-adaptive").against == ("plain", "mean-factor")
    assert plan.quantity.name == "test_error"
    assert plan.seeds == (0, 1, 2, 3, 4)
    expected = outcome_of(table_plan(), table_runs, tmp_path).results
    assert outcome.results.values("sgd", "plain") == expected.values("sgd", "plain")
    path = report.write(outcome, "layerwise report")
    assert path == tmp_path / "report" / "report.html"
    assert "layer-adaptive is shown to have a lower test error" in path.read_text()


def test_an_experiment_a_single_run_and_copies_are_counted_once(table, table_runs, tmp_path):
    report.write(table, "")
    one = next(iter(table.results.records.values())).folder
    outcome = anything.gather([table.folder, one, table_runs], tmp_path / "again")
    assert len(outcome.results.records) == 45
    assert len(anything.gather([one], tmp_path / "one").results.records) == 1
    copied = tmp_path / "copied" / one.name
    copied.mkdir(parents=True)
    for path in one.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    outcome = anything.gather([one, tmp_path / "copied"], tmp_path / "again")
    assert len(outcome.results.records) == 1
    assert "1 copies of runs are counted once." in outcome.plan.notes


def test_runs_of_several_experiments_become_subjects_of_their_own(table_runs, sweep_runs, tmp_path):
    outcome = anything.gather([table_runs, sweep_runs], tmp_path)
    names = {subject.name for subject in outcome.plan.subjects}
    assert names == {"sgd", "nag", "adagrad", "one", "two"}
    assert len(outcome.results.records) == 45 + 80
    assert all(arm.against == () for arm in outcome.plan.arms if arm.control is not None)


def test_arms_that_differ_by_a_threshold_are_found_to_be_a_group(sweep_runs, tmp_path):
    plan = anything.gather([sweep_runs], tmp_path).plan
    assert plan.layout == "thresholds"
    groups = {(arm.group, arm.value) for arm in plan.arms if arm.group}
    assert groups == {(group, value) for group in ("G case 1", "G′ case 1") for value in (0.7, 1.5, 2.5)}
    assert {arm.name for arm in plan.arms if not arm.group} == {"plain", "all"}


def test_maps_of_many_layers_keep_within_a_size(sweep, monkeypatch):
    shown = layers.ruled(sweep.results)
    assert {subject: len(arms) for subject, arms in shown.items()} == {"one": 3, "two": 3}
    assert layers.columns_for(sweep.results, shown) == maps.COLUMNS
    monkeypatch.setattr(layers, "MOST_CELLS", 20 * 4 * 6 * len(SWEEP_LAYERS))
    assert layers.columns_for(sweep.results, shown) == 20
    monkeypatch.setattr(layers, "MOST_MAPS", 4)
    assert list(layers.ruled(sweep.results)) == ["one"]
    assert "Maps of layers are drawn for 1 of 2 subjects." in build(sweep, "").html


def test_arms_with_other_constants_are_compared_with_their_own_plain_arm(tmp_path):
    plan = table_plan(seeds=1)
    runs = [run for run in plan.runs if run.subject == "sgd" and run.arm.name in ("plain", "layer-adaptive")]
    for rate in (0.01, 0.02):
        for run in runs:
            trial = {**run.configuration.trial, "rate": rate}
            configuration = replace(run.configuration, trial=trial)
            finish(tmp_path / "runs", run, 1.0 + rate, configuration=configuration, steps=TABLE_STEPS)
    found = anything.gather([tmp_path / "runs"], tmp_path).plan
    assert len(found.subjects) == 1
    assert {arm.name: arm.against for arm in found.arms} == {
        "plain, rate 0.01": (),
        "plain, rate 0.02": (),
        "layer-adaptive, rate 0.01": ("plain, rate 0.01",),
        "layer-adaptive, rate 0.02": ("plain, rate 0.02",),
    }


def test_damaged_and_unfinished_runs_are_left_out_and_untouched(tmp_path):
    plan = table_plan(seeds=2)
    runs = [run for run in plan.runs if run.subject == "sgd" and run.arm.name == "plain"]
    for run in runs:
        finish(tmp_path / "runs", run, 1.5, steps=TABLE_STEPS)
    folder = Runs(tmp_path / "runs").folder(runs[1].configuration).path
    (folder / "metrics.parquet").write_bytes(b"broken")
    unfinished = tmp_path / "runs" / "store" / "other"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    before = sorted(path for path in tmp_path.rglob("*"))
    outcome = anything.gather([tmp_path / "runs"], tmp_path / "page")
    assert len(outcome.results.records) == 1
    assert "Left out: 1 runs that are not finished, 1 that are damaged." in outcome.plan.notes
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a folder"), ("", "no finished run is below: looked for folders with run.json")],
)
def test_nothing_found_says_what_was_looked_for(tmp_path, content, message):
    place = tmp_path / "nothing"
    if content is not None:
        place.mkdir()
    with pytest.raises(UsageError, match=message):
        anything.gather([place], tmp_path)


def test_a_hostile_list_of_runs_is_not_followed_into_errors(tmp_path):
    for content in ("[]", '{"runs": 3}', '{"runs": [{"folder": 3}]}', "not JSON"):
        (tmp_path / "runs.json").write_text(content)
        with pytest.raises(UsageError, match="no finished run"):
            anything.gather([tmp_path], tmp_path)


def test_the_list_of_runs_is_relative(table):
    report.write(table, "")
    listed = json.loads((table.folder / "runs.json").read_text())
    assert len(listed["runs"]) == 45
    assert all(not Path(each["folder"]).is_absolute() for each in listed["runs"])


def test_the_renderer_can_be_started_beforehand():
    report.prepare()


def test_thresholds_of_networks_far_apart_are_each_drawn_on_a_scale_of_their_own(tmp_path):
    plan = sweep_plan("best")
    more = {"layers": SWEEP_LAYERS, "selections": sweep_selections, "quantity": "accuracy"}
    finish_plan(plan, tmp_path, lambda run: sweep_value(run) - (60 if run.subject == "two" else 0), **more)
    results = outcome_of(plan, tmp_path, tmp_path).results
    found = sweeps.thresholds(results, looks(plan))
    for name, low, high in (("one", 84, 94), ("two", 24, 34)):
        ticks = [float(text) for text in re.findall(r"<text[^>]*>(\d+)</text>", found[name].body)]
        assert len(ticks) >= 3
        assert low < min(ticks) < max(ticks) < high


def test_a_figure_that_cannot_be_written_does_not_let_the_others_be_waited_for(table, monkeypatch):
    begun = []

    def full(drawing):
        begun.append(drawing)
        time.sleep(0.3)
        raise OSError(28, "No space left on device", "figure")

    monkeypatch.setattr(files, "usable_cores", lambda: 0)  # one at a time
    monkeypatch.setattr(files, "_image", full)
    monkeypatch.setattr(files, "_rest", lambda outcome: time.sleep(2) or {})
    with pytest.raises(OSError, match="No space left"):
        report.write(table, "")
    assert len(begun) < 5  # of 33: one is at work while the first tells of its error
    assert not table.report.exists()
