"""Everything that decides the numbers of a run, and the name that follows from it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import versions

ORDERS = ("sequential", "shuffled")
"""Order of the training images: in file order without end, or shuffled anew in every epoch."""

PRECISIONS = ("float32", "tf32", "bfloat16")
MEMORY_FORMATS = ("channels_last", "contiguous")

IDENTITY_LENGTH = 12
"""Letters of a run's identity in its name; 48 bits, so that a million runs are distinct."""


SWITCHES = ("training_accuracy", "compile", "timed")
"""Constants that are true or false."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is trained and how, without the method that is compared.

    Attributes:
        data: name of the data set.
        data_digest: of an image folder: what tells it from others; None for published data, whose checksums are
            checked.
        train_count: training images, the first of the file; None for all.
        test_count: test images, likewise.
        inputs: how raw images become inputs, a key of ``inputs.INPUTS``.
        order: one of ``ORDERS``.
        batch_size: images of a training batch.
        test_batch_size: images of a test batch; changes no result but for rounding.
        model: name of the network, a key of ``networks.NETWORKS``.
        width: of the network, as its class counts it; None for the paper's.
        solver: a key of ``solvers.SOLVERS``.
        rate: base learning rate.
        momentum: of the solvers that have one; decay rate rho of AdaDelta.
        weight_decay: L2.
        delta: of AdaGrad and AdaDelta; None for the solver's own.
        policy: of the rate, a key of ``policies.POLICIES``, counted in ``policy_unit``.
        policy_unit: ``"iteration"`` or ``"epoch"``.
        gamma: of the policy.
        power: of the policy.
        stepsize: of the policy ``step``.
        steps: of the policy ``multistep``.
        iterations: updates of a run, or None if it is counted in epochs.
        epochs: passes over the training images, or None if it is counted in iterations.
        test_every: iterations between two tests, the first before the first update; None for each epoch's end.
        layers_every: iterations between two records of each layer's norms, and of its factor and rate.
        factors_every: iterations between two records of each layer's factor; 1 where controls repeat them.
        training_accuracy: whether the accuracy on the training batches is recorded at the end of each epoch.
        precision: one of ``PRECISIONS``: ``"float32"`` is the papers'; ``"tf32"`` lets a GPU multiply with 10 bits of
            fraction; ``"bfloat16"`` is autocast, with weights and updates in float32.
        memory_format: layout of the convolutions, one of ``MEMORY_FORMATS``.
        compile: whether ``torch.compile`` makes the network's kernels.
        timed: the running time is what is asked for, so the run is not shared with recipes that do not ask for it.
    """

    data: str
    data_digest: str | None = None
    train_count: int | None = None
    test_count: int | None = None
    inputs: str
    order: str
    batch_size: int
    test_batch_size: int = 100
    model: str
    width: float | None = None
    solver: str
    rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    delta: float | None = None
    policy: str = "fixed"
    policy_unit: str = "iteration"
    gamma: float | None = None
    power: float | None = None
    stepsize: int | None = None
    steps: tuple[int, ...] = ()
    iterations: int | None = None
    epochs: int | None = None
    test_every: int | None = None
    layers_every: int = 50
    factors_every: int = 10
    training_accuracy: bool = False
    precision: str = "float32"
    memory_format: str = "channels_last"
    compile: bool = False
    timed: bool = False

    def __post_init__(self) -> None:
        if (self.iterations is None) == (self.epochs is None):
            raise UsageError(
                f"iterations={self.iterations!r}, epochs={self.epochs!r}: give exactly one of them, the length of a run"
            )
        for name in ("train_count", "test_count", "iterations", "epochs", "test_every"):
            _check_whole(name, getattr(self, name), optional=True)
        for name in ("batch_size", "test_batch_size", "layers_every", "factors_every"):
            _check_whole(name, getattr(self, name))
        if self.data_digest is not None and not isinstance(self.data_digest, str):
            raise UsageError(
                f"data_digest={self.data_digest!r}: must be the digest of an image folder, or None; leave it out"
            )
        if self.order not in ORDERS:
            raise UsageError(f"order={self.order!r}: use one of {', '.join(ORDERS)}")
        switches = [(name, (False, True)) for name in SWITCHES]
        for name, known in (("precision", PRECISIONS), ("memory_format", MEMORY_FORMATS), *switches):
            value = getattr(self, name)
            if not any(value == each and type(value) is type(each) for each in known):
                raise UsageError(f"{name}={value!r}: use one of {', '.join(map(str, known)).lower()}")
        if self.policy_unit not in ("iteration", "epoch"):
            raise UsageError(f"policy_unit={self.policy_unit!r}: use 'iteration' or 'epoch'")
        if self.order == "sequential" and (self.epochs is not None or self.test_every is None):
            raise UsageError(
                "order='sequential' goes on without end and has no epochs: give iterations and test_every, or "
                "order='shuffled'"
            )
        if self.order == "sequential" and self.training_accuracy:
            raise UsageError("training_accuracy=True with order='sequential', which has no epochs: use 'shuffled'")
        if self.order == "sequential" and self.policy_unit == "epoch":
            raise UsageError("policy_unit='epoch' with order='sequential', which has no epochs: use 'iteration'")
        if self.policy == "poly" and (self.policy_unit == "epoch") != (self.epochs is not None):
            raise UsageError(
                f"policy_unit={self.policy_unit!r}: policy='poly' ends with the run, so count it as the run's length is"
            )
        for name in ("rate", "momentum", "weight_decay", "delta", "gamma", "power", "width"):
            value = getattr(self, name)
            if value is None and name not in ("rate", "momentum", "weight_decay"):
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0.0):
                raise UsageError(f"{name}={value!r}: must be a finite number of at least 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Constants:
        """Make constants from plain values, as TOML or JSON hold them.

        Args:
            values: name -> value.

        Returns:
            The constants.

        Raises:
            UsageError: an unknown or missing name, or a value out of its range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"unknown constant {unknown[0]!r}: use one of {', '.join(sorted(known))}")
        steps = values.get("steps") or ()
        given = {**values, "steps": (steps,) if isinstance(steps, int) else tuple(steps)}
        for name in SWITCHES:  # as a command line has them
            given |= {name: given[name] == "true"} if given.get(name) in ("true", "false") else {}
        try:
            return cls(**given)
        except TypeError as error:
            raise UsageError(f"a constant is missing: {error}") from error

    @property
    def policy_arguments(self) -> dict[str, Any]:
        """Arguments of the rate policy, without those that are not given."""
        given = {
            "gamma": self.gamma,
            "power": self.power,
            "stepsize": self.stepsize,
            "stepvalues": self.steps or None,
            "max_iter": (self.iterations or self.epochs) if self.policy == "poly" else None,
        }
        return {name: value for name, value in given.items() if value is not None}


def _check_whole(name: str, value: object, *, optional: bool = False) -> None:
    """Refuse what is not a whole number from 1."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}={value!r}: must be a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What one run is; two runs of equal configurations give equal numbers.

    Attributes:
        trial: the constants, or what identifies a user's own task.
        rule: name and arguments of the rule, as ``rule_making.make_rule`` takes them; None trains without an adapter.
        apply: where its factors act.
        decay: whether they multiply weight decay too, where they act on the gradient.
        threads: of each process; another number rounds otherwise, so it is part of what a run is.
        device: kind of device that the network is trained on: ``"cpu"``, ``"cuda"``.
        source: identity of the run whose factors a control repeats, or None.
        seed: of the initial weights, of the order of the batches and of what else is drawn.
    """

    trial: Mapping[str, Any]
    rule: Mapping[str, Any] | None = None
    apply: str = "auto"
    decay: str = "auto"
    threads: int = 1
    device: str = "cpu"
    source: str | None = None
    seed: int = 0

    @classmethod
    def make(cls, constants: Constants, **arm: Any) -> Configuration:
        """Make the configuration of a run of a recipe, without the constants that have their default.

        So a constant that is added later, with a default that changes nothing, leaves finished runs finished.
        """
        given = {
            field.name: getattr(constants, field.name)
            for field in fields(constants)
            if getattr(constants, field.name) != field.default
        }
        plain = json.loads(json.dumps({"trial": given, **arm}))
        return cls(**plain)

    @property
    def constants(self) -> Constants:
        """The constants of a recipe's run."""
        return Constants.of(self.trial)

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON holds it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def identity(self) -> str:
        """Letters that follow from every value and from the versions at work: no two kinds of runs share them."""
        given = {name: value for name, default in _DEFAULTS if (value := getattr(self, name)) != default}
        text = _sorted([given, versions()])
        return hashlib.sha256(text.encode()).hexdigest()[:IDENTITY_LENGTH]

    @property
    def name(self) -> str:
        """Name of the run and of its folder, for example ``lenet-mnist-LayerAdaptive-seed0-3f2a9c1d04be``."""
        about = [self.trial.get("model"), self.trial.get("data"), self.trial.get("function")]
        about += [self.rule["name"] if self.rule else "plain", f"seed{self.seed}", self.identity]
        return "-".join(_in_a_name(str(word)) for word in about if word)


@lru_cache(maxsize=1024)
def _in_a_name(word: str) -> str:
    """Write a word in letters that any file system takes."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", word)


_DEFAULTS = [(field.name, field.default) for field in fields(Configuration)]
_sorted = json.JSONEncoder(sort_keys=True, allow_nan=False).encode
