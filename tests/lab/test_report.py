"""The page, its tables and figures, from runs that are made up and written as the engine writes them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import polars
import pytest
from lab_helpers import series_of
from made_up import (
    SWEEP_LAYERS,
    TABLE_STEPS,
    finish_plan,
    outcome_of,
    sweep_plan,
    sweep_selections,
    sweep_value,
    table_plan,
    table_value,
)

from layerwise.lab import report
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import PaperValue, quantity_of
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.experiments.results import Results
from layerwise.lab.report import charts, files, layers
from layerwise.lab.report.figures import COLOURS, rows_of, slugs, styles
from layerwise.lab.report.page import build
from layerwise.lab.report.rendering import bundle
from layerwise.lab.report.tables import best_of, result_table
from layerwise.lab.report.verdicts import headline, verdicts

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
        [outcome_of(table_plan(), table_runs, tmp_path_factory.mktemp("page"))], "layerwise run singh2015-table1"
    )


@pytest.fixture(scope="module")
def sweep_page(sweep_runs, tmp_path_factory):
    return build([outcome_of(sweep_plan("best"), sweep_runs, tmp_path_factory.mktemp("page"))], "layerwise run x")


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


def own(html: str) -> str:
    """Leave the scripts out of a page."""
    return re.sub(r"<script.*?</script>", "", html, flags=re.S)


def data_of(html: str) -> dict:
    """Read the figures of a page."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found)["figures"]


@pytest.mark.parametrize("name", ["table_page", "sweep_page"])
def test_the_page_asks_the_network_for_nothing(name, request):
    html = request.getfixturevalue(name).html
    checker = Checker()
    checker.feed(html)
    assert {each for each in checker.addresses if not each.startswith("#")} <= {"data:,"}
    assert not re.search(r"https?:|//cdn|@import|fetch\(|<script|url\((?!#)", own(html))
    assert html.count("<script") == 2
    assert len(html.encode()) < 3_000_000


def test_the_policy_allows_the_own_script_alone(table_page):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', table_page.html)
    (code,) = re.findall(r"<script>(.*?)</script>", table_page.html, re.S)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'")


def test_a_bundle_that_cannot_be_kept_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert "window.vegaEmbed=" in bundle.__wrapped__()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "folder"))
    made = bundle.__wrapped__()
    (kept,) = (tmp_path / "folder").rglob("vega-*.js")
    assert kept.read_text(encoding="utf-8") == made == bundle.__wrapped__()


@pytest.mark.parametrize("name", ["table_page", "sweep_page"])
def test_the_page_is_well_formed_and_ids_are_unique(name, request):
    checker = Checker()
    checker.feed(request.getfixturevalue(name).html)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_the_page_of_a_table_holds_all_its_parts(table_page):
    html = table_page.html
    for words in (
        "After iteration 1,800, 3 of 3 comparisons show layer-adaptive with SGD, NAG and AdaGrad to have a lower test "
        "error than plain, and none beats every control.",
        '<span class="answer yes">yes</span>',
        '<span class="answer unclear">unclear</span>',
        "[−0.24, −0.16]",
        "<li>SGD: layer-adaptive has a lower test error than plain (−0.20 points, 95 % interval",
        "<li>SGD: no difference shown between layer-adaptive and plain at the mean factor",
        "paper",
        "3.29",
        "Learning curves",
        "Training loss",
        "Gradient norm",
        "Update to weight",
        "between layers",
        "What the paper says",
        "layerwise run singh2015-table1",
        "431,080 parameters in 3 layers",
        "the first 2,000 iterations",
        "Caveats",
        "5 seeds: small differences need more.",
        "prefers-color-scheme: dark",
    ):
        assert words in html
    assert "nan" not in re.sub(r"<[^>]*>", "", own(html)).lower()
    # Differences, errors and losses of three subjects; maps of four quantities and two arms with a rule.
    assert html.count('class="plot"') == 9 + 4 * 3 * 2 == len(table_page.figures) == len(data_of(html))


def test_each_figure_has_a_sentence_and_its_numbers(sweep_page):
    for figure in sweep_page.figures:
        assert re.fullmatch(r"[^.]([^.]|\.(?! ))*\.", figure.summary), figure.summary
        assert figure.table.rows
        assert {len(row) for row in figure.table.rows} == {len(figure.table.headings)}
        assert f'aria-describedby="{figure.name}-says"' in sweep_page.html


def test_what_answers_comes_before_evidence_and_evidence_before_its_origin(table_page):
    heads = re.findall(r"<h2>(.*?)</h2>", own(table_page.html))
    assert heads[:4] == [
        "Verdict",
        "Test error, the paper&#39;s and ours".replace("&#39;", "'"),
        "Learning curves: test error, %",
        "Differences, seed by seed",
    ]
    assert heads[-3:] == ["What the paper says", "How it was run", "Caveats"]


def test_all_metrics_of_a_run_are_shown(table):
    for key, record in table.results.records.items():
        finals = {**record.summary["finals"], "wasted_words": 7.0 + key[2]}
        table.results.records[key] = replace(record, summary={**record.summary, "finals": finals})
    html = build([table], "").html
    assert '<th scope="col">wasted words</th>' in html
    assert "9.0 ± 1.6" in html


def test_metrics_whose_names_are_alike_have_figures_of_their_own(table, monkeypatch):
    for key, record in table.results.records.items():
        finals = {**record.summary["finals"], "acc@1": 1.0, "acc_1": 2.0}
        table.results.records[key] = replace(record, summary={**record.summary, "finals": finals})
    monkeypatch.setattr(charts, "seed_curves", lambda *_: {0: [(1, 1.0), (2, 2.0)]})
    drawn = [charts.curves(table.results, styles(table.plan), name, name, falling=False) for name in ("acc@1", "acc_1")]
    assert not {figure.name for figure in drawn[0].values()} & {figure.name for figure in drawn[1].values()}


def test_curves_hold_every_seed_with_its_steps_and_values(table, table_page):
    rows = rows_of(data_of(table_page.html)["curve-test-error-nag"]["data"])
    seeds = {(row["arm"], row["seed"], row["step"]): row["value"] for row in rows if row["seed"] is not None}
    assert len(seeds) == 3 * 5 * 5
    for seed in range(5):
        for step, value in table.results.series(("nag", "layer-adaptive", seed), "test_error"):
            assert step == 0 or seeds["layer-adaptive", seed, step] == pytest.approx(value, rel=1e-4)
    means = {row["step"]: row for row in rows if row["seed"] is None and row["arm"] == "plain"}
    values = [table_value(run) for run in table.plan.runs if run.subject == "nag" and run.arm.name == "plain"]
    assert means[1800]["value"] == pytest.approx(statistics.fmean(values))
    assert means[1800]["high"] - means[1800]["low"] == pytest.approx(2 * statistics.stdev(values), rel=1e-3)


def test_curves_of_very_many_runs_hold_means_alone(table, monkeypatch):
    monkeypatch.setattr(charts, "SEED_POINTS", 10)
    page = build([table], "")
    data = data_of(page.html)["curve-test-error-sgd"]["data"]
    assert set(data["seed"]) == {None}


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
    wanted = {"thresholds-one", "chosen-one", "chosen-layers-one-g-1-5", "curve-accuracy-two", "factor-one-all"}
    assert wanted <= names


@pytest.mark.full
def test_hostile_strings_are_escaped(table_runs, tmp_path):
    outcome = hostile_outcome(table_runs, tmp_path)
    path = report.write(outcome, f"layerwise --out {HOSTILE}", figures=True)
    html = path.read_text()
    assert "<script" not in own(html)
    assert html.count("<script") == 2
    assert "\x1b" not in html
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
    assert not (table.folder / "figures").exists()
    path = report.write(table, "layerwise run singh2015-table1", figures=True)
    assert path == table.report == table.folder / "report.html"
    assert (tmp_path / "report.html").read_bytes() == path.read_bytes()
    figures = sorted(each.name for each in (table.folder / "figures").iterdir())
    assert len(figures) == 2 * 33
    svg = (table.folder / "figures" / "curve-test-error-sgd.svg").read_text()
    assert svg.startswith("<svg")
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
    assert "- YES. SGD: layer-adaptive has a lower test error than plain (−0.20 points" in text
    assert "- unclear. SGD: no difference shown between layer-adaptive and plain at the mean factor" in text


def test_one_run_and_no_run_make_a_page(table, tmp_path):
    key = ("sgd", "plain", 0)
    table.results.records = {key: table.results.records[key]}
    html = report.write(table, "").read_text()
    assert "1 of 45 runs are finished" in html
    assert "too few runs are finished to compare the test error" in html
    table.results.records = {}
    assert "No run is finished yet." in report.write(table, "").read_text()


def test_an_interrupted_experiment_says_what_is_missing(table):
    table.interrupted = True
    table.failures = [Failure("nag plain seed 1", "nag plain seed 1", "the disk is full")]
    del table.results.records["nag", "plain", 1]
    html = build([table], "").html
    assert "Interrupted: 44 of 45 runs are finished." in html
    assert "nag plain seed 1 failed: the disk is full." in html
    assert "(4 of 5 runs)" in html


def test_diverged_runs_are_counted_and_have_no_number(table):
    record = table.results.records["sgd", "mean-factor", 0]
    broken = replace(record, summary={**record.summary, "diverged_at": 3})
    table.results.records["sgd", "mean-factor", 0] = broken
    html = build([table], "").html
    assert "(1 of 5 diverged)" in html
    assert "1 runs diverged" in html


def test_the_table_holds_means_and_the_distance_to_the_paper(table):
    made = result_table(table.results)
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
    assert result_table(outcome.results).lead.startswith("test error in %, of one seed, after")
    (_, rows), *_ = result_table(outcome.results).sections
    assert [row.entries[-1].best for row in rows].count(True) == 1
    for key, record in list(outcome.results.records.items()):
        plain = outcome.results.records[key[0], "plain", 0]
        outcome.results.records[key] = replace(record, folder=plain.folder)
    outcome = replace(outcome, results=type(outcome.results)(outcome.plan, outcome.results.records))
    (_, rows), *_ = result_table(outcome.results).sections
    assert len({row.entries[-1].main for row in rows}) == 1
    assert not any(one.best for row in rows for one in row.entries)


def test_the_papers_numbers_beside_a_smaller_scale_say_so_and_have_no_distance(table):
    table.results.plan = replace(table.plan, paper=tuple(replace(row, full_scale=True) for row in table.plan.paper))
    last = result_table(table.results).sections[0][1][0].entries[-1]
    assert last.lines == (("paper, full scale", "1.52 ± 0.09"),)
    assert last.off is None
    assert "paper, full scale" in build([table], "").html


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
    made = result_table(results)
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


def test_what_is_shown_beside_in_the_same_unit_is_drawn_in_the_same_figures(table):
    table.plan = table.results.plan = replace(table.plan, beside=("training_accuracy", "test_loss"))
    for key, record in table.results.records.items():
        finals = {**record.summary["finals"], "training_accuracy": 90.0, "test_loss": 0.5}
        table.results.records[key] = replace(record, summary={**record.summary, "finals": finals})
        table.results._series[key, "training_accuracy"] = [(600, 70.0 + key[2]), (1800, 90.0)]
        table.results._series[key, "test_loss"] = [(600, 0.7), (1800, 0.5)]
    page = build([table], "")
    figures = {figure.name: figure for figure in page.figures}
    rows = rows_of(figures["curve-test-error-sgd"].data)
    arms = {"plain", "layer-adaptive", "plain at the mean factor"}
    assert {(row["arm"], row["measure"]) for row in rows} == {
        (arm, measure) for arm in arms for measure in ("test error", "training accuracy")
    }
    means = {row["step"]: row["value"] for row in rows if row["measure"] == "training accuracy" and row["seed"] is None}
    assert means == {600: 72.0, 1800: 90.0}
    lines = figures["curve-test-error-sgd"].files()["figures/curve-test-error-sgd.svg"].decode()
    assert lines.count('stroke-dasharray="4,3"') >= len(arms)
    assert "Solid: test error; dashed: training accuracy." in page.html
    assert "layer-adaptive, training accuracy" in page.html
    first, second = re.findall(r'<ul class="legend">(.*?)</ul>', page.html, re.S)[:2]
    assert set(re.findall('stroke-dasharray="([^"]*)"', first)) == {"none"}
    assert len(set(re.findall('stroke-dasharray="([^"]*)"', second))) == 3
    assert "curve-test-loss-sgd" in figures
    assert "curve-training-accuracy-sgd" not in figures


def test_a_level_that_is_never_reached_has_no_number(table):
    results = Results(replace(table.plan, beside=("reach 99.5",)), table.results.records)
    for key in results.records:
        results._series[key, "accuracy"] = [(0, 99.9), (1800, 99.4)]
    (_, rows) = result_table(results).sections[-1]
    assert {one.text for row in rows for one in row.entries} == {"", "–"}


def test_values_of_the_paper_without_a_cell_are_listed(table):
    few = replace(table.plan, columns=(1800,))
    table.results.plan = few
    notes = result_table(table.results).notes
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
    made = result_table(sweep.results)
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
    made = result_table(outcome_of(plan, sweep_runs, tmp_path).results)
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
    (_, rows) = result_table(outcome.results).sections[0]
    assert rows[0].entries[0].text == "12.0 ± 1.6"
    # Seed 0 takes 12 s without the tests instead of 10, the others as long as plain: a mean of 4 %.
    assert rows[0].entries[1].text == f"+4.0 % ± {statistics.stdev([20.0, 0, 0, 0, 0]):.1f}"
    assert dict(rows[0].entries[2].lines)["paper"] == "+0.05 %"
    assert "Running time" in build([outcome], "").html


def test_a_group_is_never_said_to_be_better_than_at_the_values_where_it_is(sweep):
    plain, control = [
        verdict for verdict in verdicts(sweep.results) if (verdict.subject, verdict.item) == ("one", "G case 1")
    ]
    assert (plain.against, control.against) == ("plain", "every layer")
    assert (plain.better, plain.worse) == (["1.5"], ["2.5"])
    assert control.better == ["1.5"]
    assert plain.answer() == "YES at 1, no at 1 of 3"
    assert plain.answer(named=True) == "YES at 1.5, no at 2.5"
    assert [each.words for each in plain.split()] == ["G case 1 at 0.7", "G case 1 at 1.5", "G case 1 at 2.5"]
    assert [each.answer() for each in plain.split()] == ["unclear", "YES", "no"]
    assert headline(sweep) == (
        "At the end of the runs, 2 of 6 comparisons show a higher accuracy than plain, and 2 beat every control; 2 of "
        "6 comparisons show a lower one."
    )


def test_the_headline_claims_no_more_than_is_shown(table):
    same = table.results.records["sgd", "plain", 0]
    for key in table.results.records:
        table.results.records[key] = replace(same, configuration=table.results.records[key].configuration)
    words = headline(table)
    assert words == ("After iteration 1,800, none of 3 comparisons shows a lower test error than plain.")
    table.plan = replace(table.plan, seeds=(0, 1))
    table.results.plan = table.plan
    words = "After iteration 1,800, 2 seeds are too few to show a difference in test error; it takes 5."
    assert headline(table) == words


def test_a_long_series_is_averaged_in_spans_as_a_slow_reference_does(table, monkeypatch):
    monkeypatch.setattr(charts, "POINTS", 10)
    monkeypatch.setattr(charts, "SPANS", 4)
    found = charts.curve(charts.seed_curves(table.results, "sgd", "plain", "training_loss"))
    slow = {}
    for seed in range(5):
        pairs = series_of(table.results.records["sgd", "plain", seed], "training_loss")
        for begin, end in pairwise((0, 5, 10, 15, 20)):
            slow.setdefault(end, []).append(statistics.fmean(v for step, v in pairs if begin < step <= end))
    assert [cell.step for cell in found] == [5, 10, 15, 20]
    for cell in found:
        assert cell.mean == pytest.approx(statistics.fmean(slow[cell.step]))
        assert cell.count == 5


def test_a_curve_leaves_out_what_was_measured_before_the_first_update(table):
    steps = [cell.step for cell in charts.curve(charts.seed_curves(table.results, "sgd", "plain", "test_error"))]
    assert steps == [200, 600, 1000, 1400, 1800]


def test_a_grid_averages_over_seeds_and_neighbouring_steps(table):
    found = layers.grid(table.results, "sgd", "layer-adaptive", "gradient_norm")
    assert found.ends == (1, 10, 20)
    assert found.values["conv2"] == pytest.approx([10**1.9, 10.0, 1.0])
    found = layers.grid(table.results, "sgd", "layer-adaptive", "gradient_norm", 2)
    assert found.ends == (10, 20)
    assert found.values["conv2"] == pytest.approx([(10**1.9 + 10.0) / 2, 1.0])
    assert layers.grid(table.results, "sgd", "plain", "factor") is None


def test_a_scale_holds_its_ends_and_chooses_logarithms():
    linear = layers.Scale.of([1.0, 2.0, 3.0])
    assert (linear.low, linear.high, linear.log) == (1.0, 3.0, False)
    wide = layers.Scale.of([0.0, 1e-3, 1.0])
    assert wide.log
    assert wide.low == 1e-3
    assert layers.Scale.of([2.0, 2.0]).words == ("2", "2 everywhere")
    assert layers.Scale.of([]).words == ("0", "0 everywhere")


def test_a_heat_map_holds_every_cell_once(table):
    data = layers.grid(table.results, "sgd", "layer-adaptive", "rate")
    drawn = layers.heat_map(data, layers.Scale.of(data.finite), "x", "Rate", "Rate", "iteration")
    cells = {(row["layer"], row["step"]): row["value"] for row in rows_of(drawn.data)}
    assert cells == {
        (layer, step): pytest.approx(0.01 * place)
        for place, layer in enumerate(("conv1", "conv2", "ip1"), start=1)
        for step in (1, 10, 20)
    }
    assert drawn.summary == "Rate by layer and iteration: from 0.01 to 0.03; on average 0.01 in conv1 and 0.03 in ip1."


def test_the_chosen_layers_are_counted_and_marked(sweep):
    assert charts.chosen_counts(sweep.results, "one", "G-0.7") == [3] * 10
    assert charts.chosen_counts(sweep.results, "one", "G-2.5") == [0] * 10
    drawn, left_out = layers.choices(sweep.results, "one", "G-0.7", "x", "Choices")
    assert sum(drawn.data["chosen"]) == 3 * 10
    assert left_out == ""
    drawings, _ = layers.chosen_maps(sweep.results)
    assert [figure.title for figure in drawings] == [
        f"{group}, 1.5, {subject}"
        for subject in ("ResNet-10", "ResNet-10, wider")
        for group in ("G case 1", "G′ case 1")
    ]


def test_many_choices_are_thinned_and_said_so(sweep, monkeypatch):
    monkeypatch.setattr(layers, "MOST_CHOICES", 4)
    _, left_out = layers.choices(sweep.results, "one", "G-0.7", "x", "Choices")
    assert left_out == "the first 2 of 5 seeds"


def test_arms_are_told_apart_by_colour_dash_and_shape(sweep):
    shown = styles(sweep.plan)
    assert list(shown) == ["plain", "all", "G case 1", "G′ case 1"]
    assert shown["plain"].variable == "plain"
    for part in ("variable", "dash", "shape", "words"):
        assert len({getattr(look, part) for look in shown.values()}) == 4
    many = replace(sweep.plan, arms=tuple(replace(sweep.plan.arms[1], name=str(n), words=str(n)) for n in range(24)))
    assert len({(look.variable, look.dash, look.shape) for look in styles(many).values()}) == 24


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


def test_markdown_signs_are_escaped():
    assert files.escaped("a|b *c* <i> [d](e)\nf") == r"a\|b \*c\* &#60;i&#62; \[d\](e) f"


def test_maps_of_many_layers_keep_within_a_size(sweep, monkeypatch):
    shown = layers.ruled(sweep.results)
    assert {subject: len(arms) for subject, arms in shown.items()} == {"one": 3, "two": 3}
    assert layers.columns_for(sweep.results, shown) == layers.COLUMNS
    monkeypatch.setattr(layers, "MOST_CELLS", 20 * 4 * 6 * len(SWEEP_LAYERS))
    assert layers.columns_for(sweep.results, shown) == 20
    monkeypatch.setattr(layers, "MOST_MAPS", 4)
    assert list(layers.ruled(sweep.results)) == ["one"]
    assert "Maps of layers are drawn for 1 of 2 subjects." in build([sweep], "").html


def test_the_list_of_runs_is_relative(table):
    report.write(table, "")
    listed = json.loads((table.folder / "runs.json").read_text())
    assert len(listed["runs"]) == 45
    assert all(not Path(each["folder"]).is_absolute() for each in listed["runs"])


def test_what_a_report_needs_can_be_imported_beforehand():
    report.prepare()


def test_thresholds_of_networks_far_apart_are_each_drawn_on_a_scale_of_their_own(tmp_path):
    plan = sweep_plan("best")
    more = {"layers": SWEEP_LAYERS, "selections": sweep_selections, "quantity": "accuracy"}
    finish_plan(plan, tmp_path, lambda run: sweep_value(run) - (60 if run.subject == "two" else 0), **more)
    results = outcome_of(plan, tmp_path, tmp_path).results
    found = charts.thresholds(results, styles(plan))
    for name, low, high in (("one", 84, 94), ("two", 24, 34)):
        svg = found[name].files()[f"figures/thresholds-{name}.svg"].decode()
        ticks = [float(text) for text in re.findall(r"<text[^>]*>(\d+)</text>", svg)]
        assert len(ticks) >= 3
        assert low < min(ticks) < max(ticks) < high
