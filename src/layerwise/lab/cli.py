"""The command ``layerwise``."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import INTERRUPTED, UsageError, leaving, missing_extra, nearest, open_streams, shown

if TYPE_CHECKING:
    from layerwise.lab import options
    from layerwise.lab.experiments.plan import Plan
    from layerwise.lab.experiments.recipe import Recipe
    from layerwise.lab.experiments.runner import Outcome, Settings
    from layerwise.lab.experiments.tuned_recipe import TunedRecipe

DEMOS = ("lenet", "amplification")
WITHOUT_TORCH = ("report", "completion")  # they only read what is there, and do not wait for PyTorch's import
READING = ("report", "list")  # they read what may be thousands of runs
KEEPING = ("demo", "run", "sweep", "compare", "data")  # they go on where they were interrupted


def _settings(asked: options.Work) -> Settings:
    from layerwise.lab.experiments import datasets as places
    from layerwise.lab.experiments.runner import Settings

    same = {name: getattr(asked, name) for name in ("out", "jobs", "threads", "device", "engine", "address")}
    return Settings(data_dir=places.data_dir(asked.data_dir), **same)


def _carry_out(
    asked: options.Work,
    do: Callable[[Settings, Any], Outcome | None],
    arguments: Sequence[str],
    next_command: Callable[[Outcome], str],
) -> int:
    """Carry an experiment out, write its report and print the result; of several processes the first does so."""
    from layerwise.lab import progress, report
    from layerwise.lab.report import terminal

    settings = _settings(asked)
    target = terminal.console()
    threading.Thread(target=report.prepare, daemon=True).start()
    outcome = do(settings, progress.display(target, silent=asked.json or asked.quiet))
    if outcome is None:
        return 0
    if outcome.results.records and not outcome.plan.of_trials:
        _write_report([outcome], asked, arguments)
    command = next_command(outcome) if outcome.complete else "" if outcome.alike else typed(arguments)
    if asked.json:
        sys.stdout.write(terminal.as_json(outcome) + "\n")
        for failure, *others in outcome.causes():
            more = f" (and {len(others)} more)" if others else ""
            _complain(f"{shown(f'{failure.doing}{more}: {failure.reason}')}\n{failure.details.rstrip()}")
    else:
        terminal.show(outcome, target, quiet=asked.quiet, explain=asked.explain, next_command=command)
    return outcome.exit_code


def _write_report(outcomes: Sequence[Outcome], asked: options.Shown, arguments: Sequence[str]) -> None:
    """Write the page, and show how far it is."""
    from rich.console import Console

    from layerwise.lab import report
    from layerwise.lab.progress import Meter

    target = None if asked.json or asked.quiet else Console(stderr=True, highlight=False)
    with Meter(target, "writing the report", "figures") as meter:
        report.write(outcomes, shlex.join(["layerwise", *arguments]), meter.show, figures=asked.figures)


def _carry_out_plan(plan: Plan | TunedRecipe, settings: Settings, display: Any) -> Outcome:
    from layerwise.lab.experiments import datasets as places
    from layerwise.lab.experiments import runner as experiment
    from layerwise.lab.experiments import tuned_recipe

    if isinstance(plan, tuned_recipe.TunedRecipe):
        return tuned_recipe.run(plan, settings, display)
    return experiment.carry_out(places.ready(plan, settings.data_dir), settings, display)


def _demo(asked: options.Demo, arguments: Sequence[str]) -> int:
    from layerwise.lab import data
    from layerwise.lab.experiments import recipe

    if asked.which not in DEMOS:
        raise UsageError(f"demo {asked.which!r} is not known: use {' or '.join(DEMOS)}.{nearest(asked.which, DEMOS)}")
    folder = _settings(asked).data_dir
    if asked.which == "lenet":
        if asked.weight_decay is not None:
            raise UsageError(
                f"weight-decay={asked.weight_decay!r}: the LeNet demo has Caffe's 0.0005; leave it out, or say "
                "layerwise demo amplification"
            )
        plan = recipe.load("demo-lenet").plan("full", seeds=asked.seeds)
        following = _with_data(["run", "singh2015-table1", "--scale", "full"], ["mnist"], asked, folder)
    else:
        present = data.present("cifar10", folder)
        vary = None if asked.weight_decay is None else {"weight_decay": [asked.weight_decay]}
        plan = recipe.load("demo-amplification").plan("full" if present else "digits", seeds=asked.seeds, vary=vary)
        following = typed([*arguments, "--weight-decay", "0"] if asked.weight_decay is None else ["list"])
        if not present:
            following = _with_data(["demo", "amplification"], ["cifar10"], asked, folder)
            if folder is not None:
                _complain(f"{folder} does not hold CIFAR-10, so this is run on digits5k")
    return _carry_out(asked, partial(_carry_out_plan, plan), arguments, lambda outcome: following)


def _with_data(command: Sequence[str], names: Iterable[str], asked: options.Work, folder: Path | None) -> str:
    """Give a command, after those that fetch the data sets that it needs and that are not here."""
    from layerwise.lab import data

    place = [] if asked.data_dir is None else ["--data-dir", str(asked.data_dir)]
    missing = [name for name in sorted(names) if not data.present(name, folder)]
    return " && ".join(typed([*words, *place]) for words in (*(["data", name] for name in missing), command))


def _planned(
    asked: options.OfRecipe, vary: dict[str, list[Any]] | None = None
) -> tuple[Recipe, str, Plan | TunedRecipe]:
    """Read a recipe, and lay out its runs, or what its arms try before they are compared."""
    from layerwise.lab.experiments import recipe
    from layerwise.lab.experiments.tuned_recipe import TunedRecipe

    read = recipe.load(asked.recipe)
    scale = asked.scale or read.default_scale
    if "tuned" in read.content:
        return read, scale, TunedRecipe(read, scale, seeds=asked.seeds, vary=vary)
    return read, scale, read.plan(scale, seeds=asked.seeds, vary=vary)


def _run(asked: options.Run, arguments: Sequence[str]) -> int:
    from layerwise.lab.experiments import recipe

    if "picture" in recipe.load(asked.recipe).content and asked.scale is None:
        return _picture(asked, arguments)
    read, scale, plan = _planned(asked)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from layerwise.lab.experiments import torchrun as shared_runs
        from layerwise.lab.experiments.plan import Plan

        if not isinstance(plan, Plan):
            raise UsageError(
                f"recipe {asked.recipe} is tuned, and torchrun cannot share its trials: leave torchrun out"
            )
        return _carry_out(asked, partial(shared_runs.run_shared, plan), arguments, lambda outcome: "")
    scales = [name for name in recipe.SCALES if name in read.content["scales"]]
    larger = next((name for name in scales[scales.index(scale) + 1 :]), None) if scale in scales else None

    def following(outcome: Outcome) -> str:
        if larger is None:
            return ""
        command = ["run", asked.recipe, "--scale", larger]
        return _with_data(command, read.datasets(larger), asked, outcome.settings.data_dir)

    return _carry_out(asked, partial(_carry_out_plan, plan), arguments, following)


def _picture(asked: options.Run, arguments: Sequence[str]) -> int:
    """Write the page of a recipe that has a picture and no runs."""
    from layerwise.lab.experiments import recipe
    from layerwise.lab.experiments.plan import check_seeds
    from layerwise.lab.report import schedule

    _settings(asked)  # refuses what no run could have, as other recipes do
    if asked.seeds is not None:
        check_seeds(asked.seeds)
    summary, page = schedule.write(recipe.load(asked.recipe), typed(arguments), asked.out, figures=asked.figures)
    found = {"report": str(page), "words": summary}
    sys.stdout.write((json.dumps(found) if asked.json else f"{summary}\n\nReport: {shown(page)}") + "\n")
    return 0


def _estimate(asked: options.Estimate, arguments: Sequence[str]) -> int:
    from layerwise.lab.experiments import estimate

    _, _, plan = _planned(asked)
    told = (lambda words: None) if asked.json or asked.quiet else _complain
    found = estimate.estimate(plan, _settings(asked), told)
    sys.stdout.write((json.dumps(found, indent=2) if asked.json else shown(estimate.words(found), lines=True)) + "\n")
    return 0


def _sweep(asked: options.Sweep, arguments: Sequence[str]) -> int:
    from layerwise.lab.options import assignments

    vary = assignments(asked.vary, "vary")
    if not vary:
        raise UsageError("--vary is missing: name a constant and its values, as in --vary rate=0.005,0.01")
    _, _, plan = _planned(asked, vary)
    return _carry_out(asked, partial(_carry_out_plan, plan), arguments, partial(_more_seeds, arguments))


def _more_seeds(arguments: Sequence[str], outcome: Outcome) -> str:
    """Give the same command with ten seeds, where it had fewer."""
    if len(outcome.plan.seeds) >= 10:
        return ""
    return typed([*without(arguments, "--seeds"), "--seeds", "10"])


def _compare(asked: options.Compare, arguments: Sequence[str]) -> int:
    from layerwise.lab.options import ranges
    from layerwise.lab.tasks import compare

    tune, draws = ranges(asked.tune)
    seeds = 5 if asked.seeds is None else asked.seeds
    arms = tuple(name for word in asked.arms for name in word.split(",") if name)

    def do(settings: Settings, display: Any) -> Outcome:
        given = {"draws": draws, "arms": arms, "seeds": seeds, "settings": settings, "display": display}
        return compare.run(asked.task, tune, **given)

    return _carry_out(asked, do, arguments, partial(_more_seeds, arguments))


def _doctor(asked: options.Doctor, arguments: Sequence[str]) -> int:
    from layerwise.lab.report import doctor

    return doctor.run(asked, arguments, program())


def _report(asked: options.Report, arguments: Sequence[str]) -> int:
    from layerwise.lab import report
    from layerwise.lab.report import saved, terminal

    threading.Thread(target=report.prepare, daemon=True).start()  # while the runs are read
    outcomes = saved.gather(asked.runs, out=asked.out)
    _write_report(outcomes, asked, arguments)
    if asked.json:
        told = [terminal.as_json(outcome) for outcome in outcomes]
        sys.stdout.write((told[0] if len(told) == 1 else f"[{', '.join(told)}]") + "\n")
        return 0
    for outcome in outcomes:
        following = typed(["list"]) if outcome is outcomes[-1] else ""
        how = {"quiet": asked.quiet, "explain": asked.explain, "next_command": following}
        terminal.show(outcome, terminal.console(), **how)
    return 0


def _list(asked: options.List, arguments: Sequence[str]) -> int:
    from layerwise.lab import catalogue
    from layerwise.lab.experiments import datasets as places
    from layerwise.lab.experiments import recipe

    folder = places.data_dir(asked.data_dir)
    chosen = [recipe.load(asked.recipe).name] if asked.recipe else recipe.names()
    if asked.quiet and not asked.json:
        sys.stdout.write("".join(f"{name}\n" for name in chosen))
    else:
        sys.stdout.write(catalogue.show(chosen, asked.out, folder, as_json=asked.json, program=program()))
    return 0


def _data(asked: options.Data, arguments: Sequence[str]) -> int:
    from layerwise.lab import catalogue
    from layerwise.lab.experiments import datasets as places

    # The folder that is named may not exist yet: it is made for what is fetched.
    folder = asked.data_dir or places.data_dir(None)
    return catalogue.show_data(asked.name, folder, quiet=asked.quiet, as_json=asked.json, program=program())


def _completion(asked: options.Completion, arguments: Sequence[str]) -> int:
    from layerwise.lab.options import completion

    sys.stdout.write(completion(asked.shell))
    return 0


HANDLERS: dict[str, Callable[[Any, Sequence[str]], int]] = {
    do.__name__.removeprefix("_"): do
    for do in (_demo, _run, _estimate, _sweep, _compare, _doctor, _report, _list, _data, _completion)
}


def typed(arguments: Sequence[str]) -> str:
    """Write a command line as it can be typed."""
    return f"{program()} {shlex.join(arguments)}"


def program() -> str:
    """Give this command as it can be typed: by its path where the shell would not find it."""
    if shutil.which("layerwise") or not sys.argv[0].endswith("layerwise"):
        return "layerwise"
    return shlex.quote(os.path.relpath(sys.argv[0]))


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Leave ``OPTION VALUE`` or ``OPTION=VALUE`` out."""
    before = ["", *arguments]
    return [
        argument
        for previous, argument in zip(before, arguments, strict=False)
        if option not in (previous, argument) and not argument.startswith(f"{option}=")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``layerwise``; None stands for the arguments of this process.

    Exit code: 0; 1 if a run failed or is left; 2 for a value that cannot be used; 130 if interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    open_streams()
    try:
        try:
            return _done(arguments)
        finally:
            sys.stdout.flush()  # what could not be written is an error here, and none when the process ends
    except UsageError as error:
        _complain(error)
        return 2
    except ModuleNotFoundError as error:
        explanation = missing_extra(error)
        if explanation is None:
            raise
        _complain(explanation)
        return 1
    except BrokenPipeError:
        sys.stdout = None  # who read it has gone, as head does
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}; runs that are finished are kept")
        try:
            sys.stdout.flush()
        except OSError:  # it is the very one that cannot be written
            sys.stdout = None
        return 1
    except KeyboardInterrupt:
        kept = "; what is done is kept, and the same command goes on with the rest"
        sys.stderr.write("\n")
        _complain(f"interrupted{kept if arguments[:1] and arguments[0] in KEEPING else ''}")
        return INTERRUPTED


def _complain(words: object) -> None:
    with suppress(OSError, ValueError):  # its reader may have gone
        sys.stderr.write(f"layerwise: {shown(words, lines=True)}\n")


def _done(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from layerwise import __version__

        sys.stdout.write(f"layerwise {__version__}\n")
        return 0
    from layerwise.lab.options import parse

    asked = parse(arguments)
    name = type(asked).__name__.lower()
    if name not in WITHOUT_TORCH:
        with leaving():
            import torch  # noqa: F401
    if name not in READING or not gc.isenabled():
        return HANDLERS[name](asked, arguments)
    gc.disable()  # garbage would be looked for in every run that was read, again and again
    try:
        return HANDLERS[name](asked, arguments)
    finally:
        gc.enable()
