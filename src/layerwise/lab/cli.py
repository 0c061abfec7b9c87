"""The command ``layerwise``."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from layerwise.lab.options import Demo
    from layerwise.lab.plan import Outcome


def _run_demo(options: Demo, arguments: Sequence[str]) -> int:
    """Run a demo and say what came of it."""
    from layerwise.lab import plan, progress, terminal
    from layerwise.lab.report import page

    place = options.data_dir
    if place is None and os.environ.get("LAYERWISE_DATA"):
        place = Path(os.environ["LAYERWISE_DATA"])
    asked: dict[str, Any] = {"out": options.out, "data_dir": place, "seeds": options.seeds, "jobs": options.jobs}
    demo: Any
    if options.which == "amplification":
        from layerwise.lab.amplification import console, demo
        from layerwise.lab.report import amplification as report

        if options.weight_decay is not None:
            asked["weight_decay"] = options.weight_decay
    else:
        from layerwise.lab import console, demo, report

        if options.weight_decay is not None:
            raise UsageError(
                f"weight-decay={options.weight_decay!r}: the LeNet demo has Caffe's 0.0005; leave it out, or say "
                "layerwise demo amplification"
            )
    settings = demo.Settings(**asked)
    target = terminal.console()
    threading.Thread(target=page.prepare, daemon=True).start()
    outcome: Any = demo.run_demo(settings, progress.display(target, silent=options.json or options.quiet))
    if outcome.results.records:
        plan.write_results(outcome)
        page.write(outcome, report.render(outcome, shlex.join(["layerwise", *arguments])))
    if place is not None and outcome.dataset == "digits5k":
        wanted = "CIFAR-10" if options.which == "amplification" else "full MNIST"
        sys.stderr.write(f"layerwise: {place} does not hold {wanted}, so this was run on digits5k\n")
    if options.json:
        sys.stdout.write(console.as_json(outcome) + "\n")
        for failure in outcome.failures:
            sys.stderr.write(f"layerwise: {failure.doing}: {failure.reason}\n{failure.details}")
    else:
        command = _next_command(options, outcome, arguments)
        terminal.show(outcome, console.shown(outcome), command, target, options.quiet)
    return outcome.exit_code


def _next_command(options: Demo, outcome: Outcome, arguments: Sequence[str]) -> str:
    """Give the one obvious next command: go on, the same on the full data, or what else the papers ask for."""
    if outcome.interrupted or outcome.failures:
        return shlex.join([_program(), *arguments])
    if options.which == "amplification":
        if outcome.dataset == "digits5k":
            folder = shlex.quote(f"{options.out}-cifar10")
            return f"{_program()} demo amplification --data-dir FOLDER --out {folder}   (FOLDER holds CIFAR-10)"
        if options.weight_decay is None:  # the paper does not tell its weight decay
            return shlex.join([_program(), *arguments, "--weight-decay", "0"])
        return ""
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
        from layerwise.lab.options import parse

        return _run_demo(parse(arguments or ["--help"]), arguments)
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
