"""What the terminal shows while runs, downloads and reports are at work."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from lab_helpers import tiny_plan
from rich.console import Console

from layerwise.lab import progress
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Display, Outcome, Settings
from layerwise.lab.progress import Meter, RunDisplay, duration


@pytest.fixture
def clock(monkeypatch):
    """Give a clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def outcome():
    plan = tiny_plan()
    return Outcome(plan, Settings(out=Path("runs")), Results(plan), found=3, set_aside=[Path("store/a/record.json")])


@pytest.mark.parametrize("bars", [False, True], ids=["lines", "bars"])
def test_what_is_done_and_what_is_left_are_told(outcome, clock, bars):
    target = Console(file=io.StringIO(), width=80, force_terminal=bars, record=True)
    display = RunDisplay(target)
    display.begin(outcome, 2)
    display.advance(0, "sgd plain seed 0", 0, 10)
    display.advance(1, "nag plain seed 0", 0, None)
    assert display.left == ""
    clock[0] = 60.0
    display.advance(0, "sgd plain seed 0", 5, 10)
    assert display.left == "23 min left"  # half a run a minute, 11.5 runs
    clock[0] = 70.0
    display.finished(0, "sgd plain seed 0", "1.2 % test error", False)
    assert display.left == "13 min left"
    display.finished(1, "nag plain seed 0", "diverged", True)
    display.end()
    said = " ".join(target.export_text().split())
    assert "3 of 15 runs were finished already" in said
    assert "12 runs in 2 processes; Ctrl-C keeps what is done" in said
    assert "a/record.json was damaged: set aside" in said
    assert "diverged" in said
    if not bars:
        assert "3/15 runs, 0.0833 updates/s, 23 min left; sgd plain seed 0: 5 of 10 updates" in said
        assert "4/15 runs, 0.0714 updates/s, 13 min left; sgd plain seed 0: 1.2 % test error" in said


def test_the_time_that_the_workers_take_to_start_is_no_measure_of_their_work(outcome, clock):
    display = RunDisplay(Console(file=io.StringIO()))
    display.begin(outcome, 1)
    clock[0] = 100.0  # the worker imports
    display.advance(0, "run", 0, 100)
    clock[0] = 102.0
    display.advance(0, "run", 20, 100)
    assert display.rate == "10 updates/s"
    assert display.left == "118 s left".replace("118 s", progress.duration(2.0 / 0.2 * 11.8))


def test_the_bars_of_long_names_fit_80_columns(outcome):
    target = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    display = RunDisplay(target)
    display.begin(outcome, 1)
    display.advance(0, "a subject of a long name, an arm of one seed 12", 1_000, 2_000)
    display._bars.refresh()
    display.end()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", target.file.getvalue()).splitlines()
    assert any("1,000 updates" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_work_of_an_earlier_session_does_not_make_the_rest_look_short(outcome, clock):
    display = RunDisplay(Console(file=io.StringIO()))
    display.begin(outcome, 1)
    display.advance(0, "run", 90, 100)
    clock[0] = 10.0
    display.advance(0, "run", 95, 100)
    # 0.05 runs took 10 s; 11.05 runs are left.
    assert display.left == "37 min left"


def test_a_long_run_has_a_line_now_and_then_where_there_are_no_bars(outcome, clock):
    target = Console(file=io.StringIO(), width=100, record=True)
    display = RunDisplay(target)
    display.begin(outcome, 1)
    target.export_text()
    for second in range(0, 150, 10):
        clock[0] = second
        display.advance(0, "sgd plain seed 0", second, 1000)
    said = [line.partition("; ")[2] for line in target.export_text().splitlines()]
    assert said == ["sgd plain seed 0: 60 of 1,000 updates", "sgd plain seed 0: 120 of 1,000 updates"]


def test_runs_that_are_the_same_run_are_counted_once(outcome, clock):
    outcome.repeated = 4  # as a sweep makes of the plain arm
    target = Console(file=io.StringIO(), width=80, record=True)
    display = RunDisplay(target)
    display.begin(outcome, 1)
    display.advance(0, "run 0", 0, 10)
    clock[0] = 60.0
    display.finished(0, "run 0", "1.2 % test error", False)
    assert display.left == "7 min left"  # 15 runs, of which 3 were found, 4 are others and 1 is done
    for number in range(1, 8):
        display.finished(0, f"run {number}", "1.2 % test error", False)
    said = target.export_text()
    assert "8 runs in 1 process" in said
    assert said.splitlines()[-1] == "11/11 runs; run 7: 1.2 % test error"


@pytest.mark.parametrize("bars", [False, True], ids=["lines", "bars"])
def test_a_stop_says_what_the_wait_is_for(outcome, bars):
    target = Console(file=io.StringIO(), width=100, force_terminal=bars, record=True)
    display = RunDisplay(target)
    display.begin(outcome, 1)
    display.stopping()
    display.end()
    assert "Stopping: the runs at work write their checkpoints" in target.export_text()


def test_durations_are_rough():
    assert [duration(value) for value in (0.4, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_nothing_is_shown_where_nothing_is_asked_for():
    assert type(progress.display(Console(), silent=True)) is Display
    assert isinstance(progress.display(Console(file=io.StringIO()), silent=False), RunDisplay)


# --- Anything that can be counted ------------------------------------------------------------------------------------


def test_count_rate_and_time_left_are_told(clock):
    with Meter(None, "training", "updates") as shown:
        shown.show(0, 100)
        assert shown.words(0, 100) == "0/100 updates"
        clock[0] += 5.0
        assert shown.words(20, 100) == "20/100 updates, 4/s, 20 s left"
        assert shown.words(20, None) == "20 updates, 4/s"


def test_what_was_there_at_first_is_no_work_of_this_time(clock):
    with Meter(None, "file", "MB", scale=1e6) as shown:
        shown.show(5e6, 10e6)
        clock[0] += 2.0
        assert shown.words(6e6, 10e6) == "6/10 MB, 0.5/s, 8 s left"


def test_the_clock_starts_anew_when_the_whole_is_known(clock):
    with Meter(None, "report", "figures") as shown:
        shown.show(0, None)
        clock[0] += 60.0
        shown.show(0, 10)
        clock[0] += 1.0
        assert shown.words(5, 10) == "5/10 figures, 5/s, 1 s left"


def test_elsewhere_than_in_a_terminal_there_is_a_line_after_two_seconds_and_then_every_ten(clock):
    target = Console(file=io.StringIO(), width=80)
    with Meter(target, "training", "updates") as shown:
        for second in range(30):
            shown.show(second, 30)
            clock[0] += 1.0
    lines = target.file.getvalue().splitlines()
    assert [int(re.match(r"training: (\d+)/30 updates", line)[1]) for line in lines] == [2, 12, 22]


def test_a_terminal_has_a_bar_of_which_nothing_stays(clock):
    target = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Meter(target, "training", "updates") as shown:
        shown.show(0, 10)
        clock[0] += 1.0
        shown.show(5, 10)
    text = target.file.getvalue()
    assert "5/10 updates, 5/s, 1 s left" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert text.endswith("\x1b[2K")


def test_each_file_of_a_download_has_its_own_line(clock):
    target = Console(file=io.StringIO(), width=80)
    with Meter(target, "", "MB", scale=1e6) as shown:
        for file in ("first.gz", "second.gz"):
            for done in range(10):
                shown.show(done * 1_000_000, 10_000_000, file)
                clock[0] += 1.0
    assert target.file.getvalue().splitlines() == [
        "first.gz: 2/10 MB, 1/s, 8 s left",
        "second.gz: 2/10 MB, 1/s, 8 s left",
    ]


def test_a_silent_download_shows_nothing(capsys):
    with Meter(None, "", "MB") as shown:
        shown.show(1, 2, "file")
    assert capsys.readouterr() == ("", "")
