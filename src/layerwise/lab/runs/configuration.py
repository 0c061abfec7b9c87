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

IDENTITY_LENGTH = 12
"""Letters of a run's identity in its name; 48 bits, so that a million runs are distinct."""

SWITCHES = ("training_accuracy", "flush_denormal", "compile", "timed")
"""Constants that are true or false."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "order": ("sequential", "shuffled"),
    "precision": ("float32", "tf32", "bfloat16"),
    "memory_format": ("channels_last", "contiguous"),
    "measured": ("test", "validation"),
    **dict.fromkeys(SWITCHES, (False, True)),
}
"""Constant -> the values that it may have."""

TO_THE_END = ("poly", "cosine", "warmup-cosine")
"""Rate policies that end with the run."""

SHARED_WITH_PRETRAINING = (
    "data",
    "data_digest",
    "validation_count",
    "inputs",
    "order",
    "test_batch_size",
    "model",
    "width",
    "precision",
    "memory_format",
    "compile",
)
"""Constants that a run has in common with the one whose weights it begins from."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is trained and how, without the method that is compared."""

    data: str
    data_digest: str | None = None  # tells an image folder from others; published data have checksums of their own
    train_count: int | None = None  # images, the first of the file; None for all
    test_count: int | None = None
    validation_count: int | None = None  # training images, the last of the file, that no run trains on; None for none
    measured: str = "test"  # what runs are measured on; a run measured on "validation" never reads the test images
    drawn_count: int | None = None  # training images that each seed draws of those; None for all
    shift: str | None = None  # of images or labels, a key of ``shifts.SHIFTS``
    pretrained: Mapping[str, Any] | None = None  # constants of the run whose weights this one begins from
    inputs: str  # a key of ``inputs.INPUTS``
    context: int | None = None  # symbols that a network of text reads at once
    order: str  # in file order without end, or shuffled anew in every epoch
    batch_size: int
    test_batch_size: int = 100  # changes no result but for rounding
    model: str  # a key of ``networks.NETWORKS``
    width: float | None = None  # as the network's class counts it; None for the paper's
    solver: str  # a key of ``solvers.SOLVERS``
    rate: float
    momentum: float = 0.0  # of the solvers that have one; decay rate rho of AdaDelta
    weight_decay: float = 0.0  # L2
    delta: float | None = None  # of AdaGrad and AdaDelta; None for the solver's own
    beta2: float | None = None  # of AdamW's mean of squares; None for PyTorch's 0.999
    policy: str = "fixed"  # of the rate, a key of ``solvers.POLICIES``; its arguments are the next ones
    policy_unit: str = "iteration"  # or "epoch"
    gamma: float | None = None
    power: float | None = None
    stepsize: int | None = None
    steps: tuple[int, ...] = ()
    warmup: int | None = None
    floor: float | None = None
    iterations: int | None = None  # updates of a run, or
    epochs: int | None = None  # its passes over the training images
    test_every: int | None = None  # iterations between two tests, from 0 on; None for each epoch's end
    layers_every: int = 50  # iterations between two records of each layer's norms, factor and rate
    factors_every: int = 10  # iterations between two records of each layer's factor; 1 where controls repeat them
    training_accuracy: bool = False  # recorded at the end of each epoch
    precision: str = "float32"  # the papers'; tf32: a GPU multiplies with 10 bits of fraction; bfloat16: autocast
    memory_format: str = "channels_last"  # of the convolutions
    flush_denormal: bool = False  # on the CPU numbers below 1e-38 are 0: else a network that saturates is slow
    compile: bool = False  # by ``torch.compile``
    timed: bool = False  # the running time is what is asked for: no run is shared with recipes that do not ask for it

    def __post_init__(self) -> None:
        if (self.iterations is None) == (self.epochs is None):
            raise UsageError(
                f"iterations={self.iterations!r}, epochs={self.epochs!r}: give exactly one of them, the length of a run"
            )
        counts = ("train_count", "test_count", "validation_count", "drawn_count")
        optional = (*counts, "context", "warmup", "iterations", "epochs", "test_every")
        for name in (*optional, "batch_size", "test_batch_size", "layers_every", "factors_every"):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name}={value!r}: must be a whole number from 1")
        if self.data_digest is not None and not isinstance(self.data_digest, str):
            raise UsageError(
                f"data_digest={self.data_digest!r}: must be the digest of an image folder, or None; leave it out"
            )
        for name, known in CHOICES.items():
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
        if self.measured == "validation" and self.validation_count is None:
            raise UsageError("measured='validation' without validation images: give validation_count, their number")
        if self.policy in TO_THE_END and (self.policy_unit == "epoch") != (self.epochs is not None):
            raise UsageError(
                f"policy_unit={self.policy_unit!r}: policy={self.policy!r} ends with the run, so count it as the run's "
                "length is"
            )
        for name in ("rate", "momentum", "weight_decay", "delta", "gamma", "power", "width", "beta2", "floor"):
            value = getattr(self, name)
            if value is None and name not in ("rate", "momentum", "weight_decay"):
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0.0):
                raise UsageError(f"{name}={value!r}: must be a finite number of at least 0")
        if self.pretrained is not None:
            self._check_pretrained(self.pretrained)

    def _check_pretrained(self, given: object) -> None:
        if not isinstance(given, Mapping) or given.get("train_count") is None:
            raise UsageError(
                f"pretrained={given!r}: give the constants of a run, train_count among them: these images of the file "
                "are left out of the run that begins from its weights"
            )
        refused = [name for name in given if name in (*SHARED_WITH_PRETRAINING, "measured", "pretrained")]
        if refused:
            raise UsageError(
                f"pretrained has {refused[0]}={given[refused[0]]!r}: leave it out, it follows from the run that begins "
                "from these weights"
            )
        _ = self.pretraining  # checks the others

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Constants:
        """Make constants from plain values, as TOML or JSON hold them."""
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
    def pretraining(self) -> Constants | None:
        """The constants of the run whose weights this one begins from; it never sees the test images if it need not."""
        if self.pretrained is None:
            return None
        shared = {name: getattr(self, name) for name in SHARED_WITH_PRETRAINING}
        measured = "test" if self.validation_count is None else "validation"
        return Constants.of({**shared, "measured": measured, **self.pretrained})

    @property
    def policy_arguments(self) -> dict[str, Any]:
        """Arguments of the rate policy, without those that are not given."""
        given = {
            "gamma": self.gamma,
            "power": self.power,
            "stepsize": self.stepsize,
            "stepvalues": self.steps or None,
            "warmup": self.warmup,
            "floor": self.floor,
            "max_iter": (self.iterations or self.epochs) if self.policy in TO_THE_END else None,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What one run is; two runs of equal configurations give equal numbers."""

    trial: Mapping[str, Any]  # the constants, or what identifies a user's own task
    rule: Mapping[str, Any] | None = None  # its name and arguments; None trains without an adapter
    apply: str = "auto"  # where its factors act
    decay: str = "auto"  # whether they multiply weight decay too, where they act on the gradient
    threads: int = 1  # of each process: another number rounds otherwise
    device: str = "cpu"  # its kind: "cpu", "cuda"
    source: str | None = None  # identity of the run whose factors a control repeats
    seed: int = 0  # of the initial weights, the order of the batches and what else is drawn

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

    @property
    def pretraining(self) -> Configuration | None:
        """The run whose weights this one begins from: the same for all arms and seeds."""
        before = self.constants.pretraining
        return None if before is None else Configuration.make(before, threads=self.threads, device=self.device)

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
