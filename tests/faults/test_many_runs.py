"""Thousands of runs in one folder: what a list and a report read and draw grows with the runs, and no faster."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from made_up import finish, listed, table_plan

from layerwise.lab.cli import main
from layerwise.lab.experiments.plan import PlannedRun
from layerwise.lab.report import charts, files, layers, page, saved
from layerwise.lab.runs import record as recorder
from layerwise.lab.runs.folder import Runs
from layerwise.lab.runs.store import read_signed, signed

pytestmark = pytest.mark.full

_opened: Counter[str] | None = None


def _watch(event, arguments):
    if _opened is not None and event == "open" and isinstance(arguments[0], str) and "/store/" in arguments[0]:
        _opened[arguments[0]] += 1


@pytest.fixture
def opened(monkeypatch):
    """Count how often each file of a run is opened."""
    if not getattr(sys, "_layerwise_watched", False):  # such a hook stays
        sys.addaudithook(_watch)
        sys._layerwise_watched = True
    counts = Counter()
    monkeypatch.setattr(sys.modules[__name__], "_opened", counts)
    return counts


def copied(record, out, configuration):
    """Write a finished run again, as another configuration."""
    folder = Runs(out).folder(configuration)
    folder.begin(record.about["labels"])
    for name in ("metrics.parquet", "status.json"):
        (folder.path / name).write_bytes((record.folder / name).read_bytes())
    (folder.path / "record.json").write_bytes(signed(read_signed(record.folder / "record.json")))


def many(out, source, *, arms, seeds):
    """Fill a folder with runs of a plain arm and of a method at several rates, each with several seeds."""
    plan = table_plan(seeds=1)
    runs = [run for run in plan.runs if run.subject == "sgd" and run.arm.name in ("plain", "layer-adaptive")]
    records = [finish(source, run, 1.5 - 0.1 * place) for place, run in enumerate(runs)]
    made, planned = [], []
    for rate in range(arms // 2):
        names = [f"{run.arm.name}-{rate}" for run in runs]
        for record, run, name in zip(records, runs, names, strict=True):
            against = (names[0],) if name != names[0] else ()
            made.append(replace(run.arm, name=name, words=name, against=against))
            for seed in range(seeds):
                trial = {**record.configuration.trial, "rate": 0.001 * (rate + 1)}
                configuration = replace(record.configuration, trial=trial, seed=seed)
                copied(record, out, configuration)
                planned.append(PlannedRun(subject="sgd", arm=made[-1], seed=seed, configuration=configuration))
    known = {"arms": tuple(made), "runs": tuple(planned), "seeds": tuple(range(seeds)), "columns": (), "paper": ()}
    listed(replace(plan, subjects=(plan.subject("sgd"),), **known), out)
    return len(list((out / "store").iterdir()))


def asked(arguments):
    """Give a command and the processor time that it takes, in seconds."""
    begun = time.process_time()
    assert main(arguments) == 0
    return time.process_time() - begun


@pytest.mark.parametrize(
    ("arms", "seeds"),
    [
        (52, 1),
        pytest.param(2, 2500, marks=pytest.mark.faults),
        pytest.param(50, 100, marks=pytest.mark.faults),
        pytest.param(1000, 5, marks=pytest.mark.faults),
    ],
)
def test_each_file_of_a_run_is_read_once_or_twice(tmp_path, opened, capsys, arms, seeds):
    out = tmp_path / "runs"
    count = many(out, tmp_path / "source", arms=arms, seeds=seeds)
    assert count == arms * seeds
    opened.clear()
    listed = asked(["list", "--out", str(out), "--quiet", "--json"])
    assert len(json.loads(capsys.readouterr().out)) > 10
    assert all(times == 1 for times in opened.values())
    opened.clear()
    reported = asked(["report", str(out), "--out", str(tmp_path / "page"), "--quiet"])
    ours = {path: times for path, times in opened.items() if path.startswith(str(out))}
    names = Counter(path.rpartition("/")[2] for path in ours)
    assert names == {"run.json": count, "record.json": count, "metrics.parquet": count}
    # Its checksum is taken first; its numbers are read when it is known which runs belong together.
    assert all(times <= (2 if path.endswith("metrics.parquet") else 1) for path, times in ours.items())
    html = (tmp_path / "page" / "report" / "report.html").read_text()
    assert html.count("<figure") <= page.MOST_DRAWN + 2 * charts.MOST_SUBJECTS + 4 * 24
    assert len(html) < 10_000_000
    if arms // 2 > page.MOST_ROWS:
        assert f"{arms // 2 - page.MOST_ROWS} more comparisons" in html
        assert f"Curves are drawn of the first {charts.MOST_LINES} arms" in html
    if count >= 5000:
        with capsys.disabled():
            sys.stdout.write(f"\n{arms} arms of {seeds} seeds: list {listed:.1f} s, report {reported:.1f} s\n")


def calls_of_a_page(out):
    """Count the calls of the lab's functions for what a page says, without its figures, and the tables read alone."""
    counts = Counter()

    def watch(frame, event, argument):
        if event == "call" and "/layerwise/lab/" in frame.f_code.co_filename:
            counts[frame.f_code.co_name] += 1

    sys.setprofile(watch)
    try:
        (outcome,) = saved.gather([out], out=out)
        files.markdown(outcome)
        tables = layers.factor_tables(outcome.results)
    finally:
        sys.setprofile(None)
    assert sum(len(table["columns"]) for table in tables) == len(outcome.plan.arms) // 2
    return counts.total(), counts[recorder.read_frame.__name__]


def test_what_is_done_for_a_page_grows_with_the_arms_and_no_faster(tmp_path):
    sizes = (60, 120, 180)
    for arms in sizes:
        many(tmp_path / str(arms), tmp_path / "source", arms=arms, seeds=1)
    calls_of_a_page(tmp_path / "60")  # what is done once
    found = [calls_of_a_page(tmp_path / str(arms)) for arms in sizes]
    first, second, third = (count for count, _ in found)
    assert third - second <= 1.1 * (second - first)
    assert [alone for _, alone in found] == [0, 0, 0]  # all were read together
