import os
import signal
import sys
import time
from dataclasses import dataclass

import pytest

from layerwise.lab.experiments.pool import Interrupt, run_jobs


@dataclass(frozen=True)
class Errand:
    """A job for tests."""

    name: str
    what: str = "answer"


def work(errand, link):
    """Do as the errand says; runs in another process."""
    link.doing(f"{errand.name}-step")
    if errand.what == "raise":
        raise RuntimeError("first line\nsecond line")
    if errand.what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if errand.what == "wait":
        link.send("waiting")
        while not link.stopped():
            time.sleep(0.01)
        link.send("stopped")
        return
    if errand.what == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    link.send(errand.name)


@pytest.fixture
def messages():
    return []


@pytest.fixture
def keep(messages):
    return lambda worker, message: messages.append(message)


@pytest.mark.dist
def test_crashes_are_named_and_the_other_jobs_are_done(messages, keep):
    errands = [Errand("a"), Errand("b", "raise"), Errand("c", "killed"), Errand("e")]
    failures = run_jobs(work, errands, 1, on_message=keep)
    assert messages == ["a", "e"]
    raised, killed = failures
    assert (raised.job, raised.doing, raised.reason) == ("b", "b-step", "RuntimeError: first line")
    assert "second line" in raised.details
    assert (killed.job, killed.doing, killed.reason) == ("c", "c-step", "its process was killed by signal 9")


@pytest.mark.dist
def test_a_stop_ends_the_workers_and_keeps_what_they_had_sent(messages, keep):
    errands = [Errand("a", "interrupted"), Errand("b", "wait"), Errand("never")]
    failures = run_jobs(work, errands, 1, on_message=keep, stop=lambda: "waiting" in messages)
    assert messages == ["a", "waiting", "stopped"]  # "a" was sent although its process was interrupted
    assert failures == []


def test_no_job_needs_no_process(keep):
    assert run_jobs(work, [], 4, on_message=keep) == []


def test_the_first_interrupt_is_a_flag_its_echo_is_nothing_and_a_later_one_is_raised(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as when a press reaches the process and its group
        assert interrupt.requested
        monkeypatch.setattr("layerwise.lab.experiments.pool.SAME_PRESS_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_of_a_shutdown_may_be_a_flag_too():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt(signal.SIGTERM) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
    assert signal.getsignal(signal.SIGTERM) is before
