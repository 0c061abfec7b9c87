"""What the command line takes."""

from __future__ import annotations

import contextlib
import inspect
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from layerwise.lab.errors import UsageError, nearest

DESCRIPTION = "Per-layer learning rates for PyTorch, compared honestly."


def _left_out(words: str, metavar: str = "NUMBER") -> Any:
    """Let the help say what holds where an option is left out, instead of None."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {words})")


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""An option without a value, of which the help need not say that it is off by default."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are, and how much is said."""

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")  # Folder of the runs and the reports.
    # Folder of the data sets.
    data_dir: Annotated[Path | None, _left_out("LAYERWISE_DATA, or where layerwise data puts them", "FOLDER")] = None
    json: Flag = False  # Print one JSON value and nothing else.
    quiet: Flag = False  # Print the conclusion and the place of the report only.


@dataclass(frozen=True, kw_only=True)
class Shown(Places):
    """How results are shown."""

    figures: Flag = False  # Write the figures of the report as SVG and PNG too.
    explain: Flag = False  # Print every number and comparison too, and how comparisons are judged.


@dataclass(frozen=True, kw_only=True)
class Work(Shown):
    """How runs are done."""

    # Number of seeds; fewer than 5 never show a difference.
    seeds: Annotated[int | None, _left_out("5, or the recipe's")] = None
    jobs: Annotated[int | None, _left_out("one a core, or one a GPU")] = None  # Processes side by side.
    # Of each process. Another number rounds otherwise, so its runs are other runs.
    threads: Annotated[int | None, _left_out("1")] = None
    device: str = "cpu"  # Where networks are trained: cpu, cuda (all GPUs), cuda:1, mps.
    engine: Literal["local", "ray"] = "local"  # Processes of this machine, or tasks of a Ray cluster.
    address: Annotated[str | None, _left_out("one is started here", "ADDRESS")] = None  # Of the Ray cluster.


@dataclass(frozen=True, kw_only=True)
class OfRecipe(Work):
    """Which runs are done."""

    # Its name; layerwise list names them all.
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    # smoke: a minute, no data; reduced: an hour or two on two free cores; full: the paper's own sizes and seeds.
    scale: Annotated[str | None, _left_out("reduced", "SCALE")] = None


@dataclass(frozen=True, kw_only=True)
class Demo(Work):
    """Train with and without per-layer rates: two minutes, no data.

    It says what the difference is worth. The demo lenet, which runs if none is named, trains Caffe's LeNet with three
    solvers (SGD, NAG, AdaGrad): plain, with the layer-adaptive rule, and plain at its mean factor, on digits that need
    no download.

    The demo amplification trains a narrow ResNet-10 plainly, and with the gradients doubled in some epochs of
    random layers, of the layers that G or G′ chooses, and of every layer. It uses a slice of CIFAR-10 from --data-dir,
    or the digits.

    Finished runs are never repeated.
    """

    which: tyro.conf.Positional[str] = "lenet"  # Which demo: lenet or amplification.
    # Of the amplification demo; 0 is the other one to look at.
    weight_decay: Annotated[float | None, _left_out("5e-4")] = None


@dataclass(frozen=True, kw_only=True)
class Run(OfRecipe):
    """Run a recipe: a table or figure of the papers.

    The paper's own numbers stand beside ours. What is finished is never repeated, and what was stopped goes on from
    its last checkpoint. Under torchrun all processes share each run, with batch normalisation on GPUs only: torchrun
    --nproc-per-node 2 -m layerwise run NAME.
    """


@dataclass(frozen=True, kw_only=True)
class Estimate(OfRecipe):
    """Say how long a recipe takes here, and how much memory.

    Ten updates of each of its subjects are done, and ten batches of a test. Nothing is written.
    """


@dataclass(frozen=True, kw_only=True)
class Sweep(OfRecipe):
    """Run a recipe over values of its constants.

    Every combination of them, every arm, the same seeds.
    """

    vary: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(
            help="NAME=VALUE,VALUE,... as in rate=0.005,0.01; once for each. An argument of a rule is one, as in "
            "factor=1.5,2 or kinds=conv,conv+fc or ratio=0.1,0.16, and so is a constant. Constants: rate, momentum, "
            "weight_decay, delta, beta2, batch_size, test_batch_size, model, width, solver, policy, policy_unit, "
            "gamma, power, stepsize, steps, warmup, floor, iterations, epochs, data, data_digest, train_count, "
            "test_count, validation_count, drawn_count, measured, shift, pretrained, inputs, context, order, "
            "test_every, layers_every, factors_every, training_accuracy, precision, memory_format, flush_denormal, "
            "compile, timed."
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class Compare(Work):
    """Compare methods on a model and data of your own.

    As in layerwise compare my_task.py:task. The file's function returns model, batches, loss and metric;
    docs/compare.md says how. This file is the only code that is loaded and run.
    """

    # A file of Python and a function in it.
    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE:FUNCTION")]
    # Arms by name, separated by spaces or commas; if left out: plain, layer-adaptive and its controls.
    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")] = ()
    # PARAMETER=VALUE,... of the function; or PARAMETER=LOW:HIGH:COUNT, in equal ratios; or PARAMETER=LOW:HIGH and
    # random:N, so many draws. Every arm gets the same budget, on other seeds and a validation split.
    tune: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()


@dataclass(frozen=True, kw_only=True)
class Doctor(Places):
    """Examine a task of your own before anything long is run.

    It says what would be done, and what is wrong. It tries each part once, measures what a step costs, trains for a
    little while with the task's own optimizer, and says which layers vanish, explode, are dead, or move too fast or
    too slowly. The page has the same with pictures.
    """

    # A file of Python and a function in it.
    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE:FUNCTION")]
    steps: int = 100  # Updates of the short training.
    seconds: float = 30.0  # After which the short training ends earlier.
    spectrum: bool = False  # Print the exponent of each matrix's spectrum too.
    # A parameter of the task and its values, such as width=16,32,64: how activations depend on it after 3 updates.
    coordinate_check: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print what lets a shell complete commands and options.

    For bash: layerwise completion bash > ~/.local/share/bash-completion/completions/layerwise. docs/terminal.md says
    the same of the others.
    """

    shell: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHELL")]  # bash, zsh or fish.


@dataclass(frozen=True, kw_only=True)
class Report(Shown):
    """Make a report of experiments, each judged by its own plan."""

    # Folders: what --out named, or experiments in it.
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[FOLDER ...]")] = (Path("runs"),)


@dataclass(frozen=True, kw_only=True)
class List(Places):
    """Name the recipes, what they need, and what is finished."""

    recipe: tyro.conf.Positional[str] = ""  # The only one to be shown; all if left out.
    quiet: Flag = False  # Print the names alone.


@dataclass(frozen=True, kw_only=True)
class Data(Places):
    """Fetch a data set, or say where to put its files.

    Without a name, say which there are.
    """

    # mnist, fashion-mnist, cifar10, cifar100, imagenet (or any image folder in its layout), digits5k or python-library.
    name: tyro.conf.Positional[str] = ""
    quiet: Flag = False  # Show no progress; without a name, print the names alone.


Command = Demo | Run | Estimate | Sweep | Compare | Doctor | Report | List | Data | Completion
COMMANDS: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in (Demo, Run, Compare, Sweep, Report, List, Data, Doctor, Estimate, Completion)
}
SHELLS = ("bash", "zsh", "fish")


def parse(arguments: Sequence[str]) -> Command:
    """Read the command line; for ``--help``, print it and exit."""
    if not arguments or list(arguments) in (["-h"], ["--help"]):
        sys.stdout.write(overview())
        raise SystemExit(0)
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        hint = nearest(arguments[0], COMMANDS)
        raise UsageError(f"command {arguments[0]!r} is not known: use one of {', '.join(COMMANDS)}.{hint}")
    if arguments[0] in COMMANDS:
        known = [f"--{field.name.replace('_', '-')}" for field in fields(COMMANDS[arguments[0]])]
        options = takewhile(lambda word: word != "--", arguments[1:])
        for option in (word.partition("=")[0] for word in options if word.startswith("--")):
            if option.replace("_", "-") not in [*known, "--help"]:
                how = f"layerwise {arguments[0]} --help lists its options"
                raise UsageError(f"option {option!r} is not known: {how}.{nearest(option, known)}")
    return _read(arguments)


def overview() -> str:
    """Give the help of the command alone, a line for each of its commands."""
    rows = [f"  {name:<11} {inspect.cleandoc(known.__doc__).splitlines()[0]}" for name, known in COMMANDS.items()]
    usage, more = "usage: layerwise COMMAND [OPTION ...]", "layerwise COMMAND --help lists the options of one."
    return "\n".join([usage, "", DESCRIPTION, "", *rows, "", more, "Begin with:  layerwise demo", ""])


def _read(arguments: Sequence[str]) -> Command:
    config = (tyro.conf.FlagCreatePairsOff,)
    how = {"prog": "layerwise", "description": DESCRIPTION, "config": config}
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=list(arguments), **how)


def completion(shell: str) -> str:
    """Give the text by which a shell completes commands and options."""
    if shell not in SHELLS:
        raise UsageError(f"shell={shell!r}: must be one of {', '.join(SHELLS)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "completion"
        with contextlib.suppress(SystemExit):
            _read(["--tyro-write-completion", shell, str(path)])
        return path.read_text(encoding="utf-8")


def assignments(words: Sequence[str], option: str) -> dict[str, list[Any]]:
    """Read NAME=VALUE,VALUE,... of an option: name -> values, numbers where they are numbers, else words."""
    found: dict[str, list[Any]] = {}
    for word in words:
        name, sign, values = word.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if not (name.strip() and sign and all(parts)):
            raise UsageError(f"--{option} {word!r}: write NAME=VALUE,VALUE,..., as in --{option} rate=0.005,0.01")
        if name.strip() in found:
            raise UsageError(f"--{option} {word!r}: {name.strip()} is given twice; list its values after one another")
        found[name.strip()] = [_value(part) for part in parts]
    return found


def ranges(words: Sequence[str]) -> tuple[dict[str, list[Any]], int | None]:
    """Read ``--tune``: name -> values or one range, and the N of random:N, the number of draws."""
    drawn = [word.removeprefix("random:") for word in words if word.startswith("random:")]
    if len(drawn) > 1 or not all(word.isdigit() and int(word) for word in drawn):
        raise UsageError(f"--tune random:{drawn[-1]}: give random:N once, N the number of draws, as random:12")
    found = assignments([word for word in words if not word.startswith("random:")], "tune")
    return found, int(drawn[0]) if drawn else None


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
