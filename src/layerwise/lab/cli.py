"""The command ``layerwise``."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.lab.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from layerwise.lab.demo import Outcome

DESCRIPTION = "Per-layer learning rates for PyTorch: compare methods with paired seeds, controls and intervals."


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train Caffe's LeNet with and without the layer-adaptive rule, and say what the difference is worth.

    Three solvers (SGD, NAG, AdaGrad), three arms (plain; layer-adaptive; plain at the mean factor), several
    seeds. Uses 5,000 digits that need no download, or the full MNIST where --data-dir or LAYERWISE_DATA holds
    it. Finished runs are never repeated. Writes report.html.
    """

    out: Path = Path("runs")
    """Folder of the report and the runs."""

    data_dir: Path | None = None
    """Folder that holds mnist/train-images-idx3-ubyte.gz and its companions (else LAYERWISE_DATA)."""

    seeds: int = 5
    """Number of seeds; fewer than 5 never show a difference."""

    jobs: int | None = None
    """Processes side by side; the number of usable cores if left out."""

    json: bool = False
    """Print one JSON object and nothing else."""

    quiet: bool = False
    """Print the conclusion and the place of the report only."""


def _run_demo(options: Demo, arguments: Sequence[str]) -> int:
    """Run the demo and say what came of it."""
    from layerwise.lab import console, demo, progress
    from layerwise.lab.report import prepare, write_report

    place = options.data_dir
    if place is None and os.environ.get("LAYERWISE_DATA"):
        place = Path(os.environ["LAYERWISE_DATA"])
    settings = demo.Settings(out=options.out, data_dir=place, seeds=options.seeds, jobs=options.jobs)
    target = console.console()
    threading.Thread(target=prepare, daemon=True).start()
    outcome = demo.run_demo(settings, progress.display(target, silent=options.json or options.quiet))
    if outcome.results.records:
        demo.write_results(outcome)
        write_report(outcome, shlex.join(["layerwise", *arguments]))
    if options.json:
        sys.stdout.write(console.as_json(outcome) + "\n")
        for failure in outcome.failures:
            sys.stderr.write(f"layerwise: {failure.doing}: {failure.reason}\n{failure.details}")
    else:
        console.show(outcome, _next_command(options, outcome, arguments), target, options.quiet)
    return outcome.exit_code


def _next_command(options: Demo, outcome: Outcome, arguments: Sequence[str]) -> str:
    """Give the one obvious next command: go on, or the same on the full data."""
    if outcome.interrupted or outcome.failures:
        return shlex.join([_program(), *arguments])
    if outcome.dataset == "digits5k":
        folder = shlex.quote(f"{options.out}-mnist")
        return f"{_program()} demo --data-dir FOLDER --out {folder}   (full MNIST: FOLDER holds its four .gz files)"
    if options.seeds < 10:  # Singh et al. 2015, Table I: ten runs
        return shlex.join([_program(), "demo", *_without_seeds(arguments[1:]), "--seeds", "10"])
    return ""


def _program() -> str:
    """Give this command as a person can type it: by its path where the shell would not find it."""
    if shutil.which("layerwise") or not sys.argv[0].endswith("layerwise"):
        return "layerwise"
    return shlex.quote(os.path.relpath(sys.argv[0]))


def _without_seeds(arguments: Sequence[str]) -> list[str]:
    """Leave ``--seeds N`` or ``--seeds=N`` out."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--seeds" and not argument.startswith("--seeds="):
            kept.append(argument)
        skip = argument == "--seeds" and not skip
    return kept


def _parse(arguments: Sequence[str]) -> Demo:
    """Read the command line; prints help and exits where asked to."""
    import tyro

    return tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo},
        prog="layerwise",
        description=DESCRIPTION,
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``layerwise``.

    Args:
        arguments: without the program's name; None for those of this process.

    Returns:
        Exit code: 0; 1 if a run failed; 2 for a value that cannot be used; 130 if interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" shows "?" instead of failing
    try:
        if arguments == ["--version"]:
            from layerwise import __version__

            sys.stdout.write(f"layerwise {__version__}\n")
            return 0
        return _run_demo(_parse(arguments or ["--help"]), arguments)
    except UsageError as error:
        sys.stderr.write(f"layerwise: {error}\n")
        return 2
    except ModuleNotFoundError as error:
        explanation = missing_extra(error)
        if explanation is None:
            raise
        sys.stderr.write(f"layerwise: {explanation}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nlayerwise: interrupted; finished runs are kept\n")
        return 130
