"""The runs of controls, made from the finished runs of the methods that they repeat."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import RATES, Control
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.record import Record


def control_rule(control: Control, record: Record) -> dict[str, Any]:
    """Give the rule of a control, from the run of its method, whose seed draws the layers that swap factors."""
    factor = record.summary["factor"]
    if control == "mean factor":
        return {"name": "Constant", "factors": {"*": factor["mean"]}}
    means = {name: value for name, value in factor["layers"].items() if name not in factor.get("excluded", [])}
    if control == "weighted mean factor":
        sizes = _of_layers(record, "sizes", control)
        weight = sum(sizes[name] for name in means)
        total = math.fsum(sizes[name] * value for name, value in means.items())
        return {"name": "Constant", "factors": {"*": total / weight if means else 1.0}}
    method = getattr(rules, (record.configuration.rule or {}).get("name", ""), None)
    grouped = {"layers_by": "parameter"} if getattr(method, "default_layers", None) == "parameter" else {}
    if control in ("shuffled layers", "shuffled within shapes"):
        names, seed = _factor_layers(record), record.configuration.seed
        adapted = [name for name in names if name not in factor.get("excluded", [])]
        classes = [adapted]
        if control == "shuffled within shapes":
            shapes = _of_layers(record, "shapes", control)
            classes = [[name for name in adapted if shapes[name] == shape] for shape in dict.fromkeys(shapes.values())]
            if adapted and max(map(len, classes)) < 2:
                raise UsageError(
                    f"{record.folder}: no two layers have the same shape, so the control {control!r} would repeat its "
                    "method; leave it out, or use 'shuffled layers'"
                )
        places = {name: source for group in classes for name, source in displaced(group, seed).items()}
        return {"name": "Replay", "layers": {**places, **{n: n for n in names if n not in places}}, **grouped}
    # A run that diverged at its first update has no factors that could be repeated.
    factors = {**factor["layers"], **_rearranged(control, record, means)} or {"*": 1.0}
    return {"name": "Constant", "factors": factors, **grouped}


def _rearranged(control: Control, record: Record, means: dict[str, float]) -> dict[str, float]:
    """Give the factors that a control holds fixed, from the mean factor of each layer that has one."""
    if control == "frozen factors":
        return means
    if control == "first factors":
        return _first_factors(record, means)
    if control == "reversed factors":
        order = [name for name in _factor_layers(record) if name in means]
        return {name: means[source] for name, source in zip(order, reversed(order), strict=True)}
    if control == "mean factor of each role":
        return _means_of_classes(means, _of_layers(record, "roles", control))
    # The first update's factors follow from the initial weights; the mean is that of the run, as for other controls.
    first = _means_of_classes(_first_factors(record, means), _of_layers(record, "shapes", control))
    scale = math.fsum(means.values()) / math.fsum(first.values()) if any(first.values()) else 1.0
    return {name: value * scale for name, value in first.items()}


def _means_of_classes(values: Mapping[str, float], class_of: Mapping[str, Any]) -> dict[str, float]:
    """Give each layer the mean over the layers of its class."""
    members: dict[Any, list[float]] = {}
    for name, value in values.items():
        members.setdefault(class_of[name], []).append(value)
    return {name: math.fsum(members[class_of[name]]) / len(members[class_of[name]]) for name in values}


def _first_factors(record: Record, names: Iterable[str]) -> dict[str, float]:
    """Read the factors of a run's first recorded update."""
    import polars

    rows = record.metrics().filter(polars.col("quantity") == "factor").sort("step")
    return {name: rows.filter(polars.col("layer") == name)["value"][0] for name in names}


def _of_layers(record: Record, what: str, control: Control) -> dict[str, Any]:
    """Give each layer's role, shape or size as the run has recorded it."""
    factor = record.summary["factor"]
    if what not in factor:
        raise UsageError(
            f"{record.folder} does not say the {what} of its layers, which the control {control!r} needs: an earlier "
            "version has made it; give another --out, and the run is made anew"
        )
    values = (tuple(value) if isinstance(value, list) else value for value in factor[what])
    return dict(zip(factor["names"], values, strict=True))


def _factor_layers(record: Record) -> list[str]:
    """Name the layers that have factors: parameters for LARS, modules for most rules."""
    return record.summary["factor"].get("names") or record.summary["layers"]


def displaced(names: Sequence[str], seed: int) -> dict[str, str]:
    """Draw for each layer another one, whose factor it gets; a single layer keeps its own."""
    order = list(names)
    random.Random(f"displaced {seed}").shuffle(order)
    return {name: order[(place + 1) % len(order)] for place, name in enumerate(order)}


def recorded_factors(record: Record, sources: Mapping[str, str]) -> list[dict[str, float]]:
    """Read the factors of a run, a mapping an update: each layer has those of the layer that ``sources`` names."""
    import polars

    rows = record.metrics().filter(polars.col("quantity") == "factor")
    columns = {
        str(layer): part.sort("step")["value"].to_list()
        for (layer,), part in rows.partition_by("layer", as_dict=True).items()
    }
    expected = record.summary["iterations"]
    found = {len(values) for values in columns.values()}
    if not record.diverged and found != {expected}:
        raise UsageError(
            f"{record.folder} holds factors of {sorted(found)} updates out of {expected}: a control with shuffled "
            "layers needs factors_every = 1"
        )
    names = [name for name in _factor_layers(record) if name in sources]
    count = min(found) if record.summary["diverged_at"] is None else record.summary["diverged_at"]
    steps = [{name: columns[sources[name]][step] for name in names} for step in range(count)]
    return steps or [dict.fromkeys(names, 1.0)]  # it diverged at its first update


def configuration_of_control(template: Configuration, control: Control, record: Record) -> Configuration:
    """Complete the configuration of a control's run from its method's, which it names; a mean factor is a rate."""
    place = "lr" if control in RATES else record.summary["place"]
    return replace(
        template,
        rule=control_rule(control, record),
        apply=place,
        decay=record.summary["decay"] if place == "gradient" else "auto",
        source=record.configuration.identity,
    )
