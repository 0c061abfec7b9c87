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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from layerwise.lab.errors import UsageError

Control = Literal["mean factor", "shuffled layers", "frozen factors"]
CONTROLS: tuple[Control, ...] = ("mean factor", "shuffled layers", "frozen factors")

Role = Literal["method", "plain", "control"]
ROLES: tuple[Role, ...] = ("method", "plain", "control")

CONTROL_SELECTIONS = ("AllLayers", "RandomLayers", "ShuffledLayers")
"""Choices of layers that measure nothing, or not where: what a choice that measures must be better than."""

FACTORS_ALONE = "for its factors alone"
"""How the words of an arm end that is compared with nothing: a method at the values of a control that repeats it."""


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
