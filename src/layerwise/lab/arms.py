"""The arms of a comparison: the plain optimizer, methods, and the controls that ask what a gain is made of.

A control repeats something of the method's own run of the same seed, which must be finished before it:

* ``"mean factor"``: the plain optimizer with its rate times the method's mean factor, over layers and updates. If it
  does as well, the method is a larger global rate.
* ``"shuffled layers"``: the method's factors, update by update, given to other layers. If it does as well, which layer
  gets which factor does not matter.
* ``"frozen factors"``: each layer's mean factor over the run, constant. If it does as well, following the gradient does
  not matter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from layerwise import rules
from layerwise.lab.configuration import Configuration
from layerwise.lab.errors import UsageError
from layerwise.lab.runs import Record

Control = Literal["mean factor", "shuffled layers", "frozen factors"]
CONTROLS: tuple[Control, ...] = ("mean factor", "shuffled layers", "frozen factors")

Role = Literal["method", "plain", "control"]
ROLES: tuple[Role, ...] = ("method", "plain", "control")

CONTROL_SELECTIONS = ("AllLayers", "RandomLayers", "ShuffledLayers")
"""Choices of layers that measure nothing, or not where: what a choice that measures must be better than."""

PHASES = {"params_1": rules.PARAMS_1, "params_2": rules.PARAMS_2}
"""Phases of Basodi et al. 2023, section 4, by name."""

SIMPLE_RULES = ("LayerAdaptive", "LARS", "LARC", "LayerDecay", "LayerFreezing", "BackMatching", "Constant")
SELECTIONS = ("AllLayers", "RandomLayers", "Directionality", "ShuffledLayers")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        name: short, as in ``--arms`` and in tables of numbers.
        words: as in tables for people.
        rule: name and arguments of the rule; None trains without an adapter.
        apply: where its factors act.
        control: what it repeats of the run of ``of``, or None.
        of: name of the method's arm.
        constants: values that this arm changes.
        subjects: names of the only subjects that have this arm; empty for all.
        group: arms of a group stand together in tables and figures, told apart by ``value``.
        value: the arm's place in its group, as a threshold.
        against: names of the arms that it is compared with.
        role: what it is to the others where that does not follow from its rule, or None.
    """

    name: str
    words: str
    rule: Mapping[str, Any] | None = None
    apply: str = "auto"
    control: Control | None = None
    of: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    subjects: tuple[str, ...] = ()
    group: str = ""
    value: float | None = None
    against: tuple[str, ...] = ()
    role: Role | None = None

    def __post_init__(self) -> None:
        if self.role is not None and self.role not in ROLES:
            raise UsageError(f"role={self.role!r} of arm {self.name!r}: use one of {', '.join(ROLES)}")
        if self.control is not None and self.control not in CONTROLS:
            raise UsageError(f"control={self.control!r} of arm {self.name!r}: use one of {', '.join(CONTROLS)}")
        if (self.control is None) != (self.of is None):
            raise UsageError(f"arm {self.name!r}: a control names the arm that it is 'of', and only a control does")

    @property
    def kind(self) -> Role:
        """What it is to the arms that are compared with it: what they are better than, what they must be more than."""
        if self.role is not None:
            return self.role
        if self.control is not None:
            return "control"
        if self.rule is None:
            return "plain"
        selection = self.rule.get("selection")
        name = selection.get("name") if isinstance(selection, Mapping) else None
        amplifies = self.rule.get("name") == "GradientAmplification"
        return "control" if amplifies and name in CONTROL_SELECTIONS else "method"


def phases(name_or_rows: str | Sequence[Sequence[Any]], epochs: int | None) -> list[list[Any]]:
    """Give the phases of an amplification as rows of last epoch, whether it amplifies, and factor.

    Named phases are compressed to the epochs of the run: an end e of 150 becomes e * epochs / 150, rounded.

    Args:
        name_or_rows: a key of ``PHASES``, or rows.
        epochs: of the run.

    Returns:
        The rows.

    Raises:
        UsageError: an unknown name, or a run without epochs.
    """
    if not isinstance(name_or_rows, str):
        return [list(row) for row in name_or_rows]
    if name_or_rows not in PHASES:
        raise UsageError(f"phases={name_or_rows!r}: use one of {', '.join(PHASES)}, or rows [until, amplify, factor]")
    if epochs is None:
        raise UsageError(f"phases={name_or_rows!r} count epochs: give the run epochs, not iterations")
    whole = PHASES[name_or_rows]
    ends = [round(phase.until * epochs / whole[-1].until) for phase in whole]
    if len(set(ends)) < len(ends) or ends[0] < 1:
        raise UsageError(f"epochs={epochs!r} are too few for the phases {name_or_rows!r}: use at least 15")
    return [[end, phase.amplify, phase.factor] for end, phase in zip(ends, whole, strict=True)]


def resolved(rule: Mapping[str, Any] | None, epochs: int | None) -> dict[str, Any] | None:
    """Write out what a rule's arguments only name, so that the configuration says all."""
    if rule is None:
        return None
    written = dict(rule)
    if "phases" in written:
        written["phases"] = phases(written["phases"], epochs)
    return written


def make_rule(specification: Mapping[str, Any] | None, seed: int, replay: Path | None = None) -> Any:
    """Make a rule from names and numbers.

    Args:
        specification: ``{"name": ..., **arguments}``; that of ``GradientAmplification`` has ``selection``, itself
            name and arguments, and ``phases``. Random choices take the seed of the run unless they name one.
        seed: of the run.
        replay: file of recorded factors, for ``Replay``.

    Returns:
        The rule, or None.

    Raises:
        UsageError: unknown name or argument, or a value out of its range.
    """
    if specification is None:
        return None
    arguments = dict(specification)
    name = arguments.pop("name", None)
    try:
        if name == "Replay" and replay is not None:
            return rules.Replay(replay)
        if name == "GradientAmplification":
            rows = [rules.Phase(*row) for row in arguments.pop("phases")]
            return rules.GradientAmplification(_selection(arguments.pop("selection"), seed), rows, **arguments)
        if name in SIMPLE_RULES:
            if name == "Constant":
                return rules.Constant(arguments["factors"])
            return getattr(rules, cast(str, name))(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"rule {name}: {error}") from error
    known = ", ".join((*SIMPLE_RULES, "GradientAmplification"))
    raise UsageError(f"rule name {name!r}: use one of {known}")


def _selection(specification: Mapping[str, Any], seed: int) -> Any:
    """Make the choice of layers of an amplification."""
    arguments = dict(specification)
    name = arguments.pop("name", None)
    if name not in SELECTIONS:
        raise UsageError(f"selection name {name!r}: use one of {', '.join(SELECTIONS)}")
    if name == "RandomLayers":
        arguments.setdefault("seed", seed)
    if name == "ShuffledLayers":
        return rules.ShuffledLayers(_selection(arguments.pop("of"), seed), seed=arguments.pop("seed", seed))
    return getattr(rules, name)(**arguments)


def control_rule(control: Control, record: Record) -> dict[str, Any]:
    """Give the rule of a control, from the finished run of its method.

    Args:
        control: which one.
        record: of the method's run; its seed draws the layers that swap factors.

    Returns:
        The rule's specification.
    """
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
    """Draw for each layer another one, whose factor it gets: no layer keeps its own.

    Args:
        names: of the layers.
        seed: of the draw.

    Returns:
        Layer -> the layer whose factor it gets. One layer alone keeps its own.
    """
    order = list(names)
    random.Random(f"displaced {seed}").shuffle(order)
    return {name: order[(place + 1) % len(order)] for place, name in enumerate(order)}


def recorded_factors(record: Record, sources: Mapping[str, str]) -> list[dict[str, float]]:
    """Read the factors of a run update by update, each layer with those of its source.

    Args:
        record: of the method's run, with ``factors_every`` 1.
        sources: layer -> layer whose factors it gets.

    Returns:
        One mapping of layer to factor an update.

    Raises:
        UsageError: the factors were not recorded at every update.
    """
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
    """Complete the configuration of a control's run.

    Args:
        template: the run's constants and seed.
        control: which one.
        record: of the method's finished run, which also says where its factors acted. A mean factor is a rate.

    Returns:
        The configuration, which names the method's run.
    """
    place = "lr" if control == "mean factor" else record.summary["place"]
    return replace(
        template,
        rule=control_rule(control, record),
        apply=place,
        decay=record.summary["decay"] if place == "gradient" else "auto",
        source=record.configuration.identity,
    )
