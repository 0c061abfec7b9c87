"""A report of any finished runs: what they are is read from their configurations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.lab.experiments.plan import Arm, Plan, PlannedRun, Subject
from layerwise.lab.experiments.results import Key, Results
from layerwise.lab.experiments.runner import Outcome, Settings
from layerwise.lab.report.families import grouped
from layerwise.lab.report.found import RUNS, Found, find
from layerwise.lab.report.judged import judged
from layerwise.lab.report.placed import CORE, PLAIN, Placed, arm_key, key_of, label_of, place, rivals, told_of
from layerwise.lab.report.saved import PLAN, rebuilt
from layerwise.lab.report.words import FOUND
from layerwise.lab.runs.records import Record

NAME = "report"
"""Of the folder of the pages."""


def gather(folders: Sequence[Path], out: Path) -> Outcome:
    """Make an outcome of the finished runs below folders.

    Of the folder of one experiment, its own plan is read again. Of anything else a plan is made from the runs: subjects
    are told apart by network, data, length, and the name that the experiment gave them; arms by their rule, by what a
    control repeats, and by the other constants. Methods are compared with the plain arm of the same constants, if there
    is one, else with every plain arm; and with their controls. Every comparison is counted in the family, and the page
    says that they were chosen after the runs.

    Args:
        folders: what ``--out`` named, folders of experiments, or folders of single runs, in any mix.
        out: where the report is to be written; its folder is called ``report``.

    Returns:
        The outcome, all of whose runs are finished.

    Raises:
        UsageError: a folder is not there, or none holds a finished run.
    """
    own = rebuilt(folders[0]) if len(folders) == 1 else None
    if own is not None:
        results, skipped = own
        # The folder of the pages is called report, whatever the experiment is called: its own stays as it was.
        results.plan = replace(results.plan, name=NAME)
        return Outcome(results.plan, Settings(out=out), results, found=len(results.records), skipped=skipped)
    found = find(folders)
    tuning = [record for record in found.records if _tuned(record)]
    records = [record for record in found.records if not _tuned(record)] or tuning
    left_out = len(found.records) - len(records)
    chosen = judged(records)
    placed = place(chosen.records)
    subjects = _subjects(placed)
    varying = _varying(placed)
    arms, names = _arms(placed, subjects, varying)
    arms = grouped(arms)
    taken: dict[Key, Placed] = {}
    replaced = 0
    for each, arm in zip(placed, names, strict=True):
        key = (subjects[each.subject].name, arm, each.record.configuration.seed)
        replaced += key in taken
        if key not in taken or _started(taken[key].record) < _started(each.record):
            taken[key] = each
    by_name = {arm.name: arm for arm in arms}
    notes = [*_notes(found, left_out=left_out, replaced=replaced), *chosen.notes]
    experiments = sorted({name for record in records if (name := label_of(record, "experiment"))})
    if len(experiments) > 1:
        notes.append(
            f"The runs are of {len(experiments)} experiments: {', '.join(experiments)}. Their comparisons are judged "
            "as one family, which shows less than each experiment alone: name the folder of one to judge it so."
        )
    if len(folders) == 1 and (folders[0] / RUNS).exists():
        notes.append(f"The folder of the experiment has no {PLAN} that can be read: its plan is not known.")
    data = sorted({str(each.record.configuration.trial.get("data")) for each in placed} - {"None"})
    plan = Plan(
        name=NAME,
        title=f"{len(taken)} finished runs: " + "; ".join(subject.words for subject in subjects.values()),
        source="finished runs in " + ", ".join(folder.name or folder.resolve().name for folder in folders),
        layout="thresholds" if any(arm.group for arm in arms) else "curves",
        quantity=chosen.quantity,
        columns=(),
        step_unit="epoch" if all(each.record.configuration.trial.get("epochs") for each in placed) else "iteration",
        subjects=tuple(subjects.values()),
        arms=tuple(arms),
        seeds=tuple(sorted({seed for _, _, seed in taken})),
        runs=tuple(
            PlannedRun(subject=subject, arm=by_name[arm], seed=seed, configuration=each.record.configuration)
            for (subject, arm, seed), each in taken.items()
        ),
        notes=tuple(notes),
        data_title=", ".join(data),
        found=True,
    )
    results = Results(plan, {key: each.record for key, each in taken.items()}, tables=found.tables)
    return Outcome(plan, Settings(out=out), results, found=len(taken), skipped=found.skipped)


def _tuned(record: Record) -> bool:
    """Tell whether a run only chose values on validation data."""
    return record.configuration.trial.get("measure") == "validation"


def _started(record: Record) -> str:
    return str(record.about.get("started", ""))


def _subjects(placed: Sequence[Placed]) -> dict[str, Subject]:
    """Name the subjects: key -> subject; words hold what tells those of one name apart."""
    cores = {each.subject: json.loads(each.subject) for each in placed}
    labels = Counter(label for label, _ in cores.values())
    made: dict[str, Subject] = {}
    for key, (label, core) in cores.items():
        others = [other for name, other in cores.values() if name == label]
        told = [name for name in CORE if len({key_of(other[name]) for other in others}) > 1 and core[name] is not None]
        network = core.get("model") or core.get("function") or "network"
        words = label or (f"{network} on {core['data']}" if core.get("data") else str(network))
        if labels[label] > 1:
            # A file's checksum tells two versions of a task apart; its first letters do.
            words += "".join(f", {name} {str(core[name])[:8]}" for name in told)
        names = {subject.name for subject in made.values()}
        name, count = words, 2
        while name in names:
            name, count = f"{words} ({count})", count + 1
        said = Counter(
            words for each in placed if each.subject == key and (words := label_of(each.record, "subject_words"))
        )
        # What tells subjects of one name apart follows the name in the words too.
        shown = said.most_common(1)[0][0] + name.removeprefix(label) if said and name.startswith(label) else name
        made[key] = Subject(name=name, words=shown)
    return made


def _varying(placed: Sequence[Placed]) -> dict[str, list[str]]:
    """Give the constants that differ within each subject."""
    found = {}
    for subject in dict.fromkeys(each.subject for each in placed):
        # Each once: runs of the same constants share theirs.
        rests = list({id(each.rest): each.rest for each in placed if each.subject == subject}.values())
        names = sorted({name for rest in rests for name in rest})
        found[subject] = [name for name in names if len({key_of(rest.get(name)) for rest in rests}) > 1]
    return found


def _arms(
    placed: Sequence[Placed], subjects: Mapping[str, Subject], varying: Mapping[str, list[str]]
) -> tuple[list[Arm], list[str]]:
    """Make the arms; give them, plain ones first and controls last, and the name of each run's arm."""
    by_identity: dict[str, Placed] = {}
    if any(each.record.configuration.source for each in placed):
        by_identity = {each.record.folder.name.rpartition("-")[2]: each for each in placed}
        by_identity |= {each.record.configuration.identity: each for each in placed}
    keys = [arm_key(each, varying, by_identity) for each in placed]
    members: dict[str, list[Placed]] = {}
    for key, each in zip(keys, placed, strict=True):
        members.setdefault(key, []).append(each)
    order = sorted(members, key=lambda key: (members[key][0].control is not None, members[key][0].rule != PLAIN))
    names: dict[str, str] = {}
    titles: dict[str, str] = {}
    for key in order:
        names[key] = _free(_arm_words(members[key], varying, "arm"), names.values())
        titles[key] = _free(_arm_words(members[key], varying, "arm_words"), titles.values())
    made, against = [], rivals(members, names, by_identity, varying)
    for key in order:
        first = members[key][0]
        source = by_identity.get(first.record.configuration.source or "")
        of = names[arm_key(source, varying, by_identity)] if first.control and source is not None else None
        made.append(
            Arm(
                name=names[key],
                words=titles[key],
                rule=None if of else first.record.configuration.rule,
                apply=first.record.configuration.apply,
                control=first.control if of else None,
                of=of,
                subjects=tuple(dict.fromkeys(subjects[each.subject].name for each in members[key])),
                against=tuple(against[key]),
            )
        )
    return made, [names[key] for key in keys]


def _arm_words(members: Sequence[Placed], varying: Mapping[str, list[str]], which: str) -> str:
    """Name an arm as its experiment did, in short or in words, with the constants that tell it from others."""
    first = members[0]
    labels = Counter(
        label for each in members if (label := label_of(each.record, which) or label_of(each.record, "arm"))
    )
    rule = first.record.configuration.rule
    words = labels.most_common(1)[0][0] if labels else first.control or (str(rule["name"]) if rule else "plain")
    told = told_of(first, varying)
    return words + "".join(f", {name} {_plain(value)}" for name, value in told.items() if value is not None)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _free(words: str, taken: Any) -> str:
    """Give a name that is not taken."""
    name, count = words, 2
    while name in taken:
        name, count = f"{words} ({count})", count + 1
    return name


def _notes(found: Found, *, left_out: int, replaced: int) -> list[str]:
    """Say what was done with the runs that were found."""
    notes = [f"{FOUND} Subjects, arms and comparisons are read from the configurations of the runs."]
    if found.twice:
        notes.append(f"{found.twice} copies of runs are counted once.")
    if replaced:
        notes.append(f"{replaced} runs were there in several versions of layerwise or torch: the latest is taken.")
    if found.unfinished or found.damaged:
        notes.append(f"Left out: {found.unfinished} runs that are not finished, {found.damaged} that are damaged.")
    if left_out:
        notes.append(f"Left out: {left_out} runs that only chose values on validation data.")
    return notes
