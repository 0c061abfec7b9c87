"""Ctrl-C while modules are imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from layerwise.lab.errors import INTERRUPTED, leaving

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")


@pytest.fixture
def default():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_was_there_comes_back_after_an_error_too(default):
    with leaving():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ModuleNotFoundError), leaving():
        import nothing_of_this_name  # noqa: F401
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "handler", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None], ids=["ignored", "default", "own"]
)
def test_what_somebody_else_looks_after_stays(default, handler):
    signal.signal(signal.SIGINT, handler)
    with leaving():
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_another_thread_nothing_changes(default):
    found = []

    def look():
        with leaving():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_an_interrupt_ends_the_program_without_a_word():
    program = """
import os, signal, time
from layerwise.lab.errors import leaving
signal.signal(signal.SIGINT, signal.default_int_handler)
with leaving():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (INTERRUPTED, "", "")
