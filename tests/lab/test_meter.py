"""What is told of something that can be counted."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from layerwise.lab import meter
from layerwise.lab.catalogue import Downloads
from layerwise.lab.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """Give a clock that only moves when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    return now


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
    with Downloads(target) as downloads:
        for file in ("first.gz", "second.gz"):
            for done in range(10):
                downloads.grow(file, done * 1_000_000, 10_000_000)
                clock[0] += 1.0
    assert target.file.getvalue().splitlines() == [
        "first.gz: 2/10 MB, 1/s, 8 s left",
        "second.gz: 2/10 MB, 1/s, 8 s left",
    ]


def test_nothing_is_shown_where_nothing_is_to_be(capsys):
    with Downloads(None) as downloads:
        downloads.grow("file", 1, 2)
    assert capsys.readouterr() == ("", "")
