"""How, on what and with what the runs of a page were made, and what the page does not show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from layerwise.lab.experiments.plan import Arm, Plan
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.progress import duration
from layerwise.lab.report.charts import MOST_LINES, MOST_SUBJECTS, representatives
from layerwise.lab.report.words import value_words
from layerwise.lab.stats.comparison import MINIMUM_PAIRS
from layerwise.lab.stats.wording import listed
from layerwise.lab.training.networks import NETWORKS

FEW_SEEDS = 10  # with fewer the page says that small differences need more


def provenance(outcome: Outcome) -> list[tuple[str, str]]:
    """Say how, on what and with what the runs were made, as names and words; all machines are named."""
    plan, records = outcome.plan, list(outcome.results.records.values())
    seeds = ", ".join(map(str, plan.seeds))
    if len(plan.seeds) > 2 and plan.seeds == tuple(range(plan.seeds[0], plan.seeds[-1] + 1)):
        seeds = f"{plan.seeds[0]} to {plan.seeds[-1]}"
    networks: dict[str, None] = {}
    for record in records:
        trial, summary = record.configuration.trial, record.summary
        name = str(trial.get("model") or trial.get("function") or "a network")
        name = NETWORKS.get(name, name)
        networks[f"{name}, {summary['parameters']:,} parameters in {len(summary['layers'])} layers"] = None
    rows = [("Data", plan.data_title)] if plan.data_title else []
    rows += [("Networks", "; ".join(networks) or "–"), ("Seeds", seeds)]
    rows.append(("Runs", f"{len(records)} of {outcome.planned} finished; {outcome.found} of them were found finished"))
    if not records:
        return rows
    versions = Counter(
        ", ".join(f"{name} {number}" for name, number in sorted(record.about.get("versions", {}).items()))
        + f", Python {record.about.get('python', '?')}"
        for record in records
    )
    hardware = [record.about.get("hardware", {}) for record in records]
    machines = Counter(
        "{}, {} cores, {}".format(*(each.get(name, "?") for name in ("processor", "cores", "system")))
        for each in hardware
    )
    threads = sorted({int(record.summary.get("threads", 1)) for record in records})
    seconds = sum(record.summary["seconds"] for record in records)
    tests = sum(record.summary["test_seconds"] for record in records)
    now = f"{duration(outcome.seconds)} by the clock in {outcome.jobs} process{'es' if outcome.jobs > 1 else ''}"
    if outcome.found == len(records):
        now = "no run was needed this time"
    memory = max(record.summary.get("peak_memory", 0) for record in records) / 2**20
    resumed = sum(record.summary.get("sessions", 1) > 1 for record in records)
    rows += [
        ("Versions", _counted(versions)),
        ("Hardware", _counted(machines)),
        ("Threads", f"{listed([str(count) for count in threads])} a run"),
        ("Time", f"{now}; all runs together {duration(seconds)}, {duration(tests)} of that for tests"),
        ("Memory", f"{memory:,.0f} MB at most in a process"),
    ]
    if resumed:
        rows.append(("Resumed", f"{resumed} runs were interrupted and gone on with from a checkpoint, to the bit"))
    return rows


def _counted(found: Counter[str]) -> str:
    """List what was found, with the number of runs where there are several kinds."""
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{words} ({count} runs)" for words, count in found.items())


def rule_words(plan: Plan, arm: Arm) -> str:
    """Write the rule of an arm as names and values, and what a sweep varies of it."""
    if arm.control is not None:
        return f"control: {arm.control} of {arm.of}"
    changes = "".join(f", {name} {json.dumps(value)}" for name, value in arm.constants.items())
    if arm.rule is None:
        return f"none{changes}"
    place = "" if arm.apply == "auto" else f", acting on the {arm.apply}"
    swept = ", ".join(sorted({name for subject in plan.subjects for name in subject.varied}))
    return f"{_called(arm.rule)}{place}{changes}" + (f"; {swept} as swept" if swept else "")


def _called(value: Any) -> str:
    """Write a specification as a call."""
    if isinstance(value, Mapping) and "name" in value:
        inner = ", ".join(f"{name}={_called(each)}" for name, each in value.items() if name != "name")
        return f"{value['name']}({inner})"
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def caveats(outcome: Outcome, *, grouped: bool, mapped: int) -> list[str]:
    """Say what the page does not show: the plan's notes, and what follows from the runs.

    Figures show one arm of each group where there are groups, and maps of layers so many subjects.
    """
    plan, results = outcome.plan, outcome.results
    found = list(plan.notes)
    diverged = sum(record.diverged for record in results.records.values())
    if diverged:
        found.append(
            f"{diverged} runs diverged (a loss that is not finite). They have no number: means are of the others, the "
            "count stands beside them, and an arm that diverged more often than another is never called better."
        )
    if len(plan.seeds) < MINIMUM_PAIRS:
        found.append(f"Fewer than {MINIMUM_PAIRS} seeds: no difference can be shown, whatever the means are.")
    elif len(plan.seeds) < FEW_SEEDS:
        found.append(f"{len(plan.seeds)} seeds: small differences need more.")
    found += [f"Skipped: {words}." for words in outcome.skipped]
    if plan.layout in ("thresholds", "best") and grouped:
        found.append(
            "The best threshold of a group is picked by the test images themselves, and the best of several means "
            f"is too good by chance alone: what is judged is {_judged(plan)} by itself, with a "
            "correction for the number of all comparisons."
        )
    elif plan.quantity.name == "seconds":
        found.append(
            "Times are of one machine, with other runs beside each; only their ratio within a seed is comparable, "
            "and single runs vary by several per cent."
        )
    chosen = [
        any(row[2] for row in choice["layers"].values())
        for record in results.records.values()
        for choice in record.summary.get("selections", ())
        if any(row[1] is not None for row in choice["layers"].values())  # it measured layers
    ]
    if not all(chosen):
        found.append(
            f"In {chosen.count(False)} of {len(chosen)} choices no layer passed the threshold; a run without any is "
            "plain training, and a gain of it would be no evidence on the method."
        )
    if grouped:
        found.append("Curves and maps show one arm of each group, that in the middle of its values.")
    lines = max((len(representatives(plan, subject.name)) for subject in plan.subjects), default=0)
    if lines > MOST_LINES or len(plan.subjects) > MOST_SUBJECTS:
        found.append(f"Curves are drawn of the first {MOST_LINES} arms of the first {MOST_SUBJECTS} subjects.")
    if mapped < len(plan.subjects) and results.records:
        found.append(f"Maps of layers are drawn for {mapped} of {len(plan.subjects)} subjects.")
    return found


def _judged(plan: Plan) -> str:
    """Name the values of groups that the plan compares with other arms."""
    grouped = [arm for arm in plan.arms if arm.group]
    values = sorted({arm.value for arm in grouped if arm.against and arm.value is not None})
    if all(arm.against for arm in grouped) or not values:
        return "every threshold"
    return (
        f"{'each of the thresholds' if len(values) > 1 else 'the threshold'} {listed(list(map(value_words, values)))}"
    )
