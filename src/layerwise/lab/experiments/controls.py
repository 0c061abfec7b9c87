"""The runs of controls, made from the finished runs of the methods that they repeat."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import Control
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.record import Record


def control_rule(control: Control, record: Record) -> dict[str, Any]:
    """Give the rule of a control, from the run of its method, whose seed draws the layers that swap factors."""
    factor = record.summary["factor"]
    if control == "mean factor":
        return {"name": "Constant", "factors": {"*": factor["mean"]}}
    method = getattr(rules, (record.configuration.rule or {}).get("name", ""), None)
    grouped = {"layers_by": "parameter"} if getattr(method, "default_layers", None) == "parameter" else {}
    if control == "frozen factors":
        # A run that diverged at its first update has no factors that could be repeated.
        return {"name": "Constant", "factors": factor["layers"] or {"*": 1.0}, **grouped}
    excluded = factor.get("excluded", [])
    names = [name for name in _factor_layers(record) if name not in excluded]
    places = {**displaced(names, record.configuration.seed), **{name: name for name in excluded}}
    return {"name": "Replay", "layers": places, **grouped}


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
    place = "lr" if control == "mean factor" else record.summary["place"]
    return replace(
        template,
        rule=control_rule(control, record),
        apply=place,
        decay=record.summary["decay"] if place == "gradient" else "auto",
        source=record.configuration.identity,
    )
