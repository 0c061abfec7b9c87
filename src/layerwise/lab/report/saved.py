"""The plan of an experiment, kept beside its page, so that the page can be made again from the runs alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import (
    LAYOUTS,
    Arm,
    PaperValue,
    Plan,
    PlannedRun,
    Quantity,
    Subject,
    Trial,
    Tuned,
    Tuning,
)
from layerwise.lab.experiments.results import Key, Results
from layerwise.lab.experiments.runner import Outcome, Settings
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.files import FILES
from layerwise.lab.runs.record import Record, read_run
from layerwise.lab.runs.schema import PLAN as FORM
from layerwise.lab.runs.schema import RUN_LIST, check
from layerwise.lab.runs.store import read_json, read_signed

PLAN = "plan.json"  # file with the plan of an experiment, from which and the list of runs its page can be made again
RUNS = "runs.json"  # file beside it that names the finished runs
NAME = "report"  # of the folder that ``layerwise report`` writes
MOST_NAMED = 50  # runs that are left out and named; further ones are counted

BROKEN = (OSError, ValueError, KeyError, TypeError, IndexError)
"""What reading a plan may raise whose parts do not fit together; UsageError is a ValueError."""


def as_json(plan: Plan) -> str:
    """Write everything of a plan but users' own tasks; a configuration stands once for all seeds, its only change."""
    kept: dict[str, int] = {}
    runs = []
    for run in plan.runs:
        text = json.dumps({**run.configuration.as_json(), "seed": 0}, sort_keys=True)
        runs.append([run.subject, run.arm.name, run.seed, kept.setdefault(text, len(kept))])
    plain = {field.name: getattr(plan, field.name) for field in fields(Plan)}
    plain |= {name: [asdict(each) for each in plain[name]] for name in ("subjects", "arms", "paper")}
    plain["tuning"] = None if plan.tuning is None else asdict(plan.tuning)
    plain |= {"quantity": asdict(plan.quantity), "configurations": [json.loads(text) for text in kept], "runs": runs}
    return json.dumps(plain, default=str)


def plan_of(content: Mapping[str, Any]) -> Plan:
    """Read what ``as_json`` has written; ``BROKEN`` lists what a damaged plan raises."""
    check(content, FORM, PLAN)
    subjects = tuple(Subject(**row) for row in content["subjects"])
    arms = {
        row["name"]: Arm(**{**row, "subjects": tuple(row["subjects"]), "against": tuple(row["against"])})
        for row in content["arms"]
    }
    names = {subject.name for subject in subjects}
    if len(names) < len(subjects) or len(arms) < len(content["arms"]):
        raise ValueError("two subjects or two arms of the plan have one name")
    configurations = [Configuration(**row) for row in content["configurations"]]
    runs = []
    for subject, arm, seed, place in content["runs"]:
        if subject not in names:
            raise ValueError(f"subject={subject!r}: the plan has no such subject")
        configuration = replace(configurations[place], seed=seed)
        runs.append(PlannedRun(subject=subject, arm=arms[arm], seed=seed, configuration=configuration))
    if content["layout"] not in LAYOUTS:
        raise ValueError(f"layout={content['layout']!r}: the plan has no such layout")
    return Plan(
        **{
            **{name: value for name, value in content.items() if name not in ("configurations", "found")},
            "quantity": Quantity(**content["quantity"]),
            "subjects": subjects,
            "arms": tuple(arms.values()),
            "runs": tuple(runs),
            "paper": tuple(PaperValue(**row) for row in content["paper"]),
            "tuning": tuning_of(content.get("tuning")),
            "constants": {name: (value, str(source)) for name, (value, source) in content["constants"].items()},
            **{name: tuple(content[name]) for name in ("columns", "seeds", "claims", "notes")},
        }
    )


def tuning_of(content: Mapping[str, Any] | None) -> Tuning | None:
    """Read how the arms of a plan were tuned."""
    if content is None:
        return None
    arms = tuple(
        Tuned(
            **{
                **row,
                "trials": tuple(Trial(**trial) for trial in row["trials"]),
                "warnings": tuple(row["warnings"]),
            }
        )
        for row in content["arms"]
    )
    if not all(any(trial.setting == one.chosen for trial in one.trials) for one in arms):
        raise ValueError("an arm of the plan has chosen a setting that it did not try")
    return Tuning(**{**content, "seeds": tuple(content["seeds"]), "arms": arms})


def rebuilt(folder: Path) -> tuple[Results, list[str]] | None:
    """Read the plan of an experiment and its finished runs; give the results, and what was left out of them, by name.

    None where the folder has no plan and list of runs that fit together, or no run is left.
    """
    try:
        plan = plan_of(read_signed(folder / PLAN))
        content = read_json(folder / RUNS)
        check(content, RUN_LIST, folder / RUNS)
        listed = [((each["subject"], each["arm"], each["seed"]), each["folder"]) for each in content["runs"]]
        planned = {run.key: run for run in plan.runs}
        records: dict[Key, Record] = {}
        left_out: list[str] = []
        for key, place in listed:
            try:
                record = read_run(listed_place(folder, place))
                if key not in planned or not _fits(record.configuration, planned[key]):
                    raise UsageError("the plan has no run of this configuration")
                records[key] = record
            except (OSError, UsageError) as error:
                named = str(error).startswith(str(folder / place))
                left_out.append(str(error) if named else f"{folder / place}: {error}")
    except BROKEN:
        return None
    results = Results(plan, records)
    unreadable = results.leave_out_unreadable()
    if not results.records:
        return None
    lost = len(listed) - len(results.records)
    if lost:
        words = f"{lost} runs that the experiment had finished are gone or damaged, or are of another configuration."
        results.plan = replace(plan, notes=(*plan.notes, words))
    if len(left_out) > MOST_NAMED:
        left_out[MOST_NAMED:] = [f"{len(left_out) - MOST_NAMED} more that could not be read"]
    return results, [*left_out, *unreadable]


def _fits(configuration: Configuration, planned: PlannedRun) -> bool:
    """Tell whether a run is the one that was planned; what a control repeats was not known then."""
    expected = planned.configuration
    if planned.arm.control is not None:
        same = configuration.source is not None
        return same and (configuration.trial, configuration.seed) == (expected.trial, expected.seed)
    return configuration == expected


def gather(folders: Sequence[Path], out: Path) -> list[Outcome]:
    """Make an outcome of each experiment in folders, judged by its own plan; ``out`` is where the report is to go.

    The folders are those of experiments, or what ``--out`` named, which holds such folders.
    """
    places = dict.fromkeys(place for folder in folders for place in experiments_in(folder))
    outcomes: list[Outcome] = []
    broken: list[str] = []
    for place in places:
        found = rebuilt(place)
        if found is None:
            broken.append(
                f"{place}: {PLAN} and {RUNS} do not fit together, or no run in them is left; start the command of the "
                "experiment again, which keeps finished runs and writes both"
            )
            continue
        results, skipped = found
        # Its own folder stays as it is.
        results.plan = replace(results.plan, name=NAME)
        outcomes.append(Outcome(results.plan, Settings(out=out), results, found=len(results.records), skipped=skipped))
    if not outcomes:
        raise UsageError(broken[0])
    outcomes[0].skipped.extend(broken)
    return outcomes


def experiments_in(folder: Path) -> list[Path]:
    """Give the folders of experiments that a folder is or holds."""
    if not folder.is_dir():
        raise UsageError(f"runs={str(folder)!r} is not a folder: give folders that layerwise has written to")
    if os.path.lexists(folder / PLAN):
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{PLAN}") if not path.parent.is_symlink())
    # A report made before repeats one of the others.
    found = [place for place in found if place.name != NAME] or found
    if found:
        return found
    words = f"runs={str(folder)!r}: holds no experiment ({PLAN})"
    below = [] if (folder / "store").is_dir() else sorted(path.parent for path in folder.glob(f"*/{FILES}"))
    for place in (folder, *below):
        # The page of a picture has no tables beside it.
        if [os.path.lexists(place / name) for name in (FILES, "report.html", "table.md")] == [True, True, False]:
            raise UsageError(f"{words}, but a picture without runs: its page is {place / 'report.html'}")
    raise UsageError(
        f"{words}; give the folder that --out named, or start the experiment's command again, which keeps finished "
        "runs and writes its plan"
    )


def listed_place(page: Path, folder: str) -> Path:
    """Give the folder of a run that an experiment's list names, which must lie below ``--out``, as ``page`` does.

    A list from somebody else must not gather files of this machine.
    """
    if os.path.isabs(folder) or "\0" in folder:
        raise UsageError(f"{page / RUNS} names it by a path that is not relative")
    above = os.path.realpath(page.absolute().parent)
    place = os.path.realpath(page / folder)
    if os.path.commonpath([above, place]) != above:
        raise UsageError(f"{page / RUNS} names a run outside of {above}: give the folder of that run to report instead")
    return page / folder
