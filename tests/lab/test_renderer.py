"""The processes that draw figures: what they give, what ends them, and whose letters they use."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from made_up import finish, table_plan

from layerwise.lab.cli import main
from layerwise.lab.report import drawing, renderer
from layerwise.lab.report.renderer import OWN_LETTERS, Process, Renderer

pytest.importorskip("vl_convert")

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="30" font-family="sans-serif">{1}</svg>'
TEXT = '<text x="5" y="20" font-size="14">{}</text>'
CHART = {"$schema": drawing.VEGA_LITE, "data": {"values": [{"x": 1, "y": "a"}]}, "mark": "point"}


@pytest.fixture
def made():
    one = Renderer()
    yield one
    one.end()


def identities(one):
    return [process._process.pid for process in one.processes if process._process is not None]


def gone(identity):
    try:
        os.kill(identity, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{identity}/stat", encoding="utf-8") as stream:
        return stream.read().rpartition(")")[2].split()[0] == "Z"


def test_each_caller_gets_its_own_figure_however_many_ask_at_once(made):
    widths = list(range(10, 130))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda width: made.pixels(SVG.format(width, "")), widths))
    assert [int.from_bytes(picture[16:20], "big") for picture in pictures] == [renderer.SCALE * w for w in widths]
    assert made.chart(CHART).startswith("<svg")


def test_it_draws_what_the_library_draws_here(made):
    import vl_convert

    assert made.chart(CHART) == vl_convert.vegalite_to_svg(CHART)
    shape = SVG.format(40, '<circle cx="9" cy="9" r="7" fill="#1e9c89"/>')
    assert made.pixels(shape) == vl_convert.svg_to_png(shape, scale=renderer.SCALE)


def test_the_own_font_has_every_letter_that_is_drawn_with_it():
    process = Process()
    letters = [
        chr(code) for code in range(0x10000) if OWN_LETTERS.fullmatch(chr(code)) and chr(code) not in " \t\n\u00a0"
    ]
    assert len(letters) > 700
    assert set("Δ‖′±×−·≤…–“”²½√Σ").issubset(letters)
    assert not {unicodedata.category(letter) for letter in letters} & {"Cn", "Cc", "Mn", "Me"}

    def picture(letter):
        return hashlib.sha256(process.ask(renderer.PIXELS, SVG.format(40, TEXT.format(f"&#{ord(letter)};")).encode()))

    try:
        without = {picture(letter).digest() for letter in "\u4e00\u3042\U0001f600 "}
        assert [letter for letter in letters if picture(letter).digest() in without] == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("letter", ["\u4e00", "∈", "\u0301", "\U0001f600"])
def test_other_letters_are_drawn_with_the_fonts_of_the_machine(made, letter):
    own, others = made.pixel_processes[0], made.other_process
    made.pixels(SVG.format(40, TEXT.format("plain")))
    assert own._process is not None
    assert others._process is None
    made.pixels(SVG.format(40, TEXT.format(letter)))
    made.chart({**CHART, "title": letter})
    assert others._process is not None
    assert made.chart_process._process is None
    assert "FONTCONFIG_FILE" in own.environment
    assert others.environment is None


def test_what_the_renderer_refuses_is_an_error_here_and_it_goes_on(made):
    with pytest.raises(ValueError, match="Vega-Lite to SVG conversion failed"):
        made.chart({"$schema": drawing.VEGA_LITE, "mark": {"type": 3}, "encoding": 7})
    with pytest.raises(ValueError, match=r"unknown token at 1:1$"):
        made.pixels("no picture")
    drawing_now = made.pixel_processes[0]._process
    assert all(made.pixels(SVG.format(40, "")).startswith(b"\x89PNG") for _ in made.pixel_processes)
    assert made.pixel_processes[0]._process is drawing_now


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed as on POSIX")
def test_a_process_that_was_killed_while_it_drew_is_told_of_and_replaced(made):
    made.chart(CHART)
    (identity,) = identities(made)
    os.kill(identity, signal.SIGSTOP)  # so that it has not answered yet
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(made.chart, CHART)
        time.sleep(0.1)
        assert not asked.done()
        os.kill(identity, signal.SIGKILL)
        with pytest.raises(
            ChildProcessError, match=r"the process that draws figures ended \(exit code -9\): try again"
        ):
            asked.result()
    assert made.chart(CHART).startswith("<svg")
    assert identities(made) != [identity]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed as on POSIX")
def test_a_process_that_was_killed_while_nobody_asked_it_is_replaced(made):
    made.chart(CHART)
    (before,) = identities(made)
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)  # until it is gone, and without taking its exit code
    assert made.chart(CHART).startswith("<svg")
    assert identities(made) != [before]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes as on Linux")
@pytest.mark.parametrize("ending", ["killed", "ended", "terminated"])
def test_none_outlives_who_started_it(ending):
    program = """
import os, sys, time
from layerwise.lab.cli import main
from layerwise.lab.report import drawing, renderer
drawn = drawing.vega("name", "label", {"data": {"values": [{}]}, "mark": "point"})
drawn.png
print(*(p._process.pid for p in renderer.renderer().processes if p._process), flush=True)
assert os.getsid(0) not in [os.getsid(p._process.pid) for p in renderer.renderer().processes if p._process]
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    found = [int(word) for word in process.stdout.readline().split()]
    assert len(found) == 2
    assert not any(map(gone, found))
    if ending == "ended":
        process.stdin.close()
    else:
        process.send_signal(signal.SIGKILL if ending == "killed" else signal.SIGTERM)
    assert process.wait(30) == {"killed": -signal.SIGKILL, "ended": 0, "terminated": -signal.SIGTERM}[ending]
    process.stdin.close()
    process.stdout.close()
    limit = time.monotonic() + 20
    while not all(map(gone, found)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert all(map(gone, found))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="is interrupted by a timer as on POSIX")
def test_a_figure_whose_caller_was_interrupted_is_not_given_to_the_next(made, monkeypatch):
    made.pixels(SVG.format(10, ""))
    slow = SVG.format(3000, '<g opacity="0.5"><rect width="3000" height="30"/></g>' * 200)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            made.pixels(slow)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for width in (10, 20, 30):
        assert int.from_bytes(made.pixels(SVG.format(width, ""))[16:20], "big") == renderer.SCALE * width


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_has_a_renderer_of_its_own_and_leaves_the_other_alone():
    program = f"""
import os, sys
from layerwise.lab.report import renderer
kept = renderer.renderer()
kept.pixels({SVG.format(40, "")!r})
before = [process._process.pid for process in kept.processes if process._process]
identity = os.fork()
if identity == 0:
    drawn = renderer.renderer().pixels({SVG.format(40, "")!r})
    good = drawn.startswith(bytes([137])) and renderer.renderer() is not kept
    sys.exit(0 if good else 1)  # which ends what it began
assert os.waitpid(identity, 0)[1] == 0
assert renderer.renderer() is kept
for _ in kept.processes:
    assert kept.pixels({SVG.format(40, "")!r}).startswith(bytes([137]))
assert before == [process._process.pid for process in kept.processes if process._process][:1]
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes as on Linux")
def test_a_fork_does_not_keep_the_processes_of_a_parent_that_was_killed():
    program = f"""
import os, signal, sys, time
from layerwise.lab.report import renderer
renderer.renderer().pixels({SVG.format(40, "")!r})
(identity,) = [process._process.pid for process in renderer.renderer().processes if process._process]
fork = os.fork()
if fork == 0:
    os.close(1), os.close(2)
    time.sleep(60)
print(identity, fork, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    identity, fork = map(int, result.stdout.split())
    try:
        limit = time.monotonic() + 20
        while not gone(identity) and time.monotonic() < limit:
            time.sleep(0.02)
        assert gone(identity)
        assert not gone(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_renderer_that_was_ended_begins_nothing_again():
    one = Renderer()
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(one.pixels, SVG.format(2000, '<g opacity="0.5"/>' * 100)) for _ in range(60)]
        asked[0].result()
        one.end()
        told = {str(each.exception()) for each in asked if each.exception() is not None}
    assert told
    assert all("the renderer of figures was ended" in words or "exit code -9" in words for words in told)
    assert identities(one) == []
    with pytest.raises(ChildProcessError, match="was ended"):
        one.chart(CHART)


def test_entries_of_the_path_that_are_no_paths_are_left_out(made, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, None, *(f"/{number:01000}" for number in range(300))])
    assert made.pixels(SVG.format(40, "")).startswith(b"\x89PNG")


def test_a_machine_without_the_library_says_which_it_is(monkeypatch):
    monkeypatch.setattr(renderer, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        Renderer().chart(CHART)
    assert caught.value.name == "vl_convert"


def test_the_list_of_fonts_names_none():
    text = renderer.FONTS.read_text(encoding="utf-8")
    (folder,) = re.findall("<dir>(.*)</dir>", text)
    assert not os.path.exists(folder)


def test_a_report_whose_figures_cannot_be_drawn_ends_with_one_line(tmp_path, monkeypatch, capsys):
    for run in table_plan(seeds=2).runs:
        finish(tmp_path / "runs", run, 1.5 + 0.1 * run.seed)
    words = ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page"), "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(renderer, "PROGRAM", "import os; os._exit(3)")
        patched.setattr(renderer, "_renderer", Renderer())
        assert main(words) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "layerwise: the process that draws figures ended (exit code 3): try again; runs that are finished are kept\n"
    )
    assert not (tmp_path / "page" / "report" / "report.html").exists()
    assert main(words) == 0
    assert (tmp_path / "page" / "report" / "report.html").exists()
