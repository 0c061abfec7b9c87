import io
import re
from pathlib import Path

import pytest
from lab_helpers import tiny_plan
from rich.console import Console

from layerwise.lab import progress
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome, Settings
from layerwise.lab.progress import BarDisplay, LineDisplay, duration


@pytest.fixture
def outcome():
    plan = tiny_plan()
    return Outcome(plan, Settings(out=Path("runs")), Results(plan), found=3, set_aside=[Path("store/a/record.json")])


@pytest.mark.parametrize("kind", [LineDisplay, BarDisplay])
def test_what_is_done_and_what_is_left_are_told(outcome, monkeypatch, kind):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    target = Console(file=io.StringIO(), width=80, force_terminal=kind is BarDisplay, record=True)
    display = kind(target)
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
    if kind is LineDisplay:
        assert "3/15 runs, 0.0833 updates/s, 23 min left; sgd plain seed 0: 5 of 10 updates" in said
        assert "4/15 runs, 0.0714 updates/s, 13 min left; sgd plain seed 0: 1.2 % test error" in said


def test_the_time_that_the_workers_take_to_start_is_no_measure_of_their_work(outcome, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display = LineDisplay(Console(file=io.StringIO()))
    display.begin(outcome, 1)
    clock[0] = 100.0  # the worker imports
    display.advance(0, "run", 0, 100)
    clock[0] = 102.0
    display.advance(0, "run", 20, 100)
    assert display.rate == "10 updates/s"
    assert display.left == "118 s left".replace("118 s", progress.duration(2.0 / 0.2 * 11.8))


def test_the_bars_of_long_names_fit_80_columns(outcome):
    target = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    display = BarDisplay(target)
    display.begin(outcome, 1)
    display.advance(0, "a subject of a long name, an arm of one seed 12", 1_000, 2_000)
    display._progress.refresh()
    display.end()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", target.file.getvalue()).splitlines()
    assert any("1,000 updates" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_work_of_an_earlier_session_does_not_make_the_rest_look_short(outcome, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display = LineDisplay(Console(file=io.StringIO()))
    display.begin(outcome, 1)
    display.advance(0, "run", 90, 100)
    clock[0] = 10.0
    display.advance(0, "run", 95, 100)
    # 0.05 runs took 10 s; 11.05 runs are left.
    assert display.left == "37 min left"


def test_a_long_run_has_a_line_now_and_then_where_there_are_no_bars(outcome, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    target = Console(file=io.StringIO(), width=100, record=True)
    display = LineDisplay(target)
    display.begin(outcome, 1)
    target.export_text()
    for second in range(0, 150, 10):
        clock[0] = second
        display.advance(0, "sgd plain seed 0", second, 1000)
    said = [line.partition("; ")[2] for line in target.export_text().splitlines()]
    assert said == ["sgd plain seed 0: 60 of 1,000 updates", "sgd plain seed 0: 120 of 1,000 updates"]


@pytest.mark.parametrize("kind", [LineDisplay, BarDisplay])
def test_a_stop_says_what_the_wait_is_for(outcome, kind):
    target = Console(file=io.StringIO(), width=100, record=True)
    display = kind(target)
    display.begin(outcome, 1)
    display.stopping()
    display.end()
    assert "Stopping: the runs at work write their checkpoints" in target.export_text()


def test_durations_are_rough():
    assert [duration(value) for value in (0.4, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_nothing_is_shown_where_nothing_is_asked_for():
    assert type(progress.display(Console(), silent=True)).__name__ == "Display"
    assert isinstance(progress.display(Console(file=io.StringIO()), silent=False), LineDisplay)
