"""The command as a process: in a terminal of 80 columns, in a pipe, interrupted, and what it ends with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from made_up import finish_plan, listed, table_plan

from layerwise.lab import cli, options
from layerwise.lab.catalogue import shortly
from layerwise.lab.experiments.recipe import load, names

ROOT = Path(__file__).parents[3]
COMMAND = "import sys; from layerwise.__main__ import main; sys.argv[0] = 'layerwise'; sys.exit(main())"
# Of a program that a shell has put in the background, children ignore Ctrl-C.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
MODULE = "import runpy, sys; sys.argv[0] = 'layerwise'; runpy.run_module('layerwise', run_name='__main__')"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7]|38|4[0-7]|48)[0-9;]*m")

TASK = """
import time
import torch
from torch import nn

def task(seed, pause=0.0):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(8, 4)

    def loss(model, batch):
        time.sleep(pause)
        return (model(batch) - batch[:, :1]).square().mean()

    return {
        "model": model,
        "batches": [inputs] * 20,
        "loss": loss,
        "metric": lambda model: {"error": float(loss(model, inputs).detach())},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "epochs": 5,
    }
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: v for name, v in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    return kept | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | more


def in_pipe(words: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-c", COMMAND, *words]
    return subprocess.run(whole, cwd=folder, env=environment(**more), capture_output=True, text=True)


def in_terminal(words: list[str], folder: Path, **more: str) -> tuple[str, int]:
    """Run the command in a terminal of 80 columns; give what it wrote there, and its exit code."""
    pty = pytest.importorskip("pty", reason="there are no terminals of this kind")
    import fcntl
    import struct
    import termios

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        cwd=folder,
        env=environment(**more),
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    return written.decode(errors="replace"), process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(TASK, encoding="utf-8")
    (tmp_path / "slow.py").write_text(TASK.replace("pause=0.0", "pause=0.06"), encoding="utf-8")
    return tmp_path


# --- A terminal and a pipe --------------------------------------------------------------------------------------------


def test_the_list_fits_80_columns_and_has_a_line_a_recipe(folder):
    text, code = in_terminal(["list"], folder, NO_COLOR="1")
    assert code == 0
    lines = ESCAPE.sub("", text).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[: len(names())]] == names()
    for name, line in zip(names(), lines, strict=False):
        assert line.split()[1] == load(name).title.split()[0]
        read = load(name)
        assert (shortly(read.need(read.default_scale).time) if read.content["scales"] else "no runs") in line
    assert lines[-1] == "Next:   layerwise run singh2015-table1 --scale smoke"


def test_one_recipe_is_told_with_everything(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["list", "singh2015-table3"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    words = " ".join(said.split())
    need = load("singh2015-table3").need("full")
    assert f"time {need.time}" in words
    assert f"memory {need.memory}" in words
    assert f"data {need.data}" in words


def test_times_are_short_in_the_list():
    for name in names():
        assert all(len(shortly(load(name).need(scale).time)) <= 13 for scale in load(name).content["scales"])
    assert shortly("about 40 days on one K40 (Caffe docs: 26.5 s, 100 s a test), estimated") == "40 days"


@pytest.mark.full
def test_the_doctor_shows_rate_and_time_left_in_a_terminal_and_leaves_nothing_of_it(folder):
    text, code = in_terminal(["doctor", "slow.py:task", "--steps", "60"], folder)
    assert code == 0
    assert re.search(r"training .*\d+/60 updates, [\d.]+/s, \d+ s left", ESCAPE.sub("", text))
    last = ESCAPE.sub("", text.rpartition("\x1b[2K")[2])
    assert "updates, " not in last.partition("task ")[0]
    assert max(len(line) for line in last.splitlines()) <= 80


@pytest.mark.full
def test_in_a_pipe_there_are_plain_lines_and_no_escapes(folder):
    ended = in_pipe(["doctor", "slow.py:task", "--steps", "60"], folder)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^training: \d+/60 updates, [\d.]+/s, \d+ s left$", ended.stderr, re.M)
    assert "\x1b" not in ended.stdout + ended.stderr
    assert max(map(len, ended.stdout.splitlines())) <= 80


@pytest.mark.full
@pytest.mark.dist
def test_a_comparison_shows_rate_and_time_left_and_no_colour_where_none_is_wanted(folder):
    (folder / "short.py").write_text(TASK.replace("pause=0.0", "pause=0.02"), encoding="utf-8")
    words = ["compare", "short.py:task", "--arms", "layer-decay", "--seeds", "1", "--jobs", "1", "--figures"]
    text, code = in_terminal(words, folder, NO_COLOR="1")
    assert code == 0
    assert re.search(r"all runs .*\d/\d+ runs, [\d.,]+ updates/s, \d+ s left", ESCAPE.sub("", text))
    assert re.search(r"writing the report .*\d+/\d+ figures", ESCAPE.sub("", text))
    assert not COLOUR.search(text)
    again, code = in_terminal(words, folder)
    assert code == 0
    assert COLOUR.search(again)
    ended = in_pipe([*words, "--quiet"], folder)
    assert "Report: " in ended.stdout
    assert "Next" not in ended.stdout
    assert "\x1b" not in ended.stdout
    assert ended.stderr == ""


# --- Exit codes -------------------------------------------------------------------------------------------------------


def table() -> dict[int, str]:
    page = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8")
    return {int(code): words for code, words in re.findall(r"^\| (\d+) \| (.*) \|$", page, re.M)}


def test_the_table_of_exit_codes_is_what_the_command_says():
    assert sorted(table()) == [0, 1, 2, 130]
    assert cli.main.__doc__ is not None
    for code in table():
        assert re.search(rf"\b{code}\b", cli.main.__doc__)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["list", "--quiet"], 0),
        (["data", "--json"], 0),
        (["completion", "bash"], 0),
        (["doctor", "own.py:task", "--quiet"], 0),
        (["doctor", "nothing.py:task"], 2),
        (["doctor", "own.py:task", "--steps", "0"], 2),
        (["run", "nothing"], 2),
        (["completion", "bsh"], 2),
        (["report", "nothing"], 2),
        (["nothing"], 2),
        (["doctor"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_command_ends_with_its_code(folder, monkeypatch, capsys, words, code):
    monkeypatch.chdir(folder)
    try:
        ended = cli.main(words)
    except SystemExit as error:  # what the reader of the command line itself refuses
        ended = error.code
    assert ended == code
    captured = capsys.readouterr()
    assert (captured.err == "") == (code == 0)
    assert "Traceback" not in captured.err


def test_a_problem_ends_with_1(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "own.py").write_text(TASK.replace("lr=0.01", "lr=1e-6"), encoding="utf-8")
    assert cli.main(["doctor", "own.py:task", "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("problem     layers move slowly")


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_a_report_does_without_torch(tmp_path):
    plan = table_plan(seeds=2)
    finish_plan(plan, tmp_path / "runs", lambda run: 1.5 + 0.1 * run.seed)
    listed(plan, tmp_path / "runs")
    assert any(run.arm.control for run in plan.runs)  # whose names need the versions at work
    program = COMMAND.replace("sys.exit(main())", "code = main(); sys.exit(code if 'torch' not in sys.modules else 9)")
    for folder in ("runs", "runs/report"):
        words = ["report", folder, "--out", "runs", "--quiet"]
        result = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "runs" / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("start", [COMMAND, MODULE], ids=["script", "module"])
def test_ctrl_c_while_torch_is_imported_ends_without_a_word(tmp_path, start):
    (tmp_path / "torch.py").write_text(
        textwrap.dedent("""
        import sys, time
        sys.stdout.write("importing\\n")
        sys.stdout.flush()
        time.sleep(60)
        """),
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS + start, "list"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src")])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
def test_ctrl_c_in_the_doctor_ends_with_130_and_one_line(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS + COMMAND, "doctor", "slow.py:task", "--steps", "100000", "--seconds", "600"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("training: ")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.split("\n")[-2:] == ["layerwise: interrupted", ""]
    assert "Traceback" not in err


# --- Completion -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_takes_the_completion_and_finishes_commands_and_options(tmp_path):
    script = tmp_path / "layerwise"
    script.write_text(options.completion("bash"), encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    asked = textwrap.dedent(f"""
        set -e
        source {script}
        complete -p layerwise
        ask() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $function; echo "${{COMPREPLY[@]}}"; }}
        function=$(complete -p layerwise | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        ask layerwise do
        ask layerwise doctor --st
        ask layerwise comp
    """)
    ended = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[1:] == ["doctor", "--steps", "compare completion"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_the_completion(shell, tmp_path):
    text = options.completion(shell)
    assert "doctor" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(text, encoding="utf-8")
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).returncode == 0


def test_the_page_on_the_terminal_names_every_shell():
    page = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8")
    assert set(re.findall(r"layerwise completion (\w+)", page)) == set(options.SHELLS)
