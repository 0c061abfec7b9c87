"""Tests on small toy parameters where a factor can act on an optimizer of another package.

Each class is tried once for each setting: runs of twelve or more steps of a copy (the twin) on a few tiny tensors, 0.1
to 2 s of CPU time. Parameter groups with fixed rates are the reference. The trial answers three questions. May a group
be divided? Does a rate that changes with each step act as the same rate of a permanent group does? Does a scaled step
last, or does the optimizer take the weights back?
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors import has_values, runs_on_fakes, several_processes
from ..apply import Partition, mark, write_back
from ..optimizers import Where, is_foreign, known_reason, known_to_divide
from .toys import (
    WIDE,
    CannotTryError,
    CommunicatesError,
    Guard,
    Workshop,
    attributes_of,
    parameters_of,
    tensors_in,
    undisturbed,
)

STEPS = 12
MIDDLE = 4
"""The step at which the factors change, or begin."""
LONG = 250
"""Steps of a run where something may show only later.

That is so where the state holds copies of the weights, which may act on the weights only every few steps, and where
steps change options of a group, which may come to differ between its parts.
"""
LARGE, LARGE_STEPS = 30.0, 6
"""By what large toys are multiplied, and the steps of a run on them."""
WIDE_STEPS = 3
"""Steps of a run on wide toys."""
HALF = {torch.float16, torch.bfloat16}
MOST_UNDONE = 0.03
"""The largest part of a shift of the weights that a step may undo.

An optimizer that undoes more keeps weights of its own.
"""
SCALELESS = 0.005
"""The largest effect of doubled gradients on an optimizer that divides by them, relative to how far weights move."""


class Limits(NamedTuple):
    """Differences of two runs, relative to how far the weights move.

    Args:
        rounding: The largest that counts as rounding.
        equal: The largest between scaled writes and another way of scaling.
        effect: The smallest that counts as an effect of the factors.
    """

    rounding: float = 0.05
    equal: float = 0.05
    effect: float = 0.05


LIMITS = {torch.float64: Limits(1e-6, 1e-9, 1e-5), torch.float32: Limits(1e-2, 1e-3, 1e-3)}
"""The limits of a type; the default ones apply to any other."""

ATTEMPTS = (
    (False, True, "plain"),
    (False, True, "closure"),
    (False, True, "graph"),
    (False, False, "plain"),
    (True, True, "plain"),
    (True, True, "graph"),
)
"""The arguments of `_attempt`, in the order tried: some optimizer of another package needs each of them."""

Factors = tuple[tuple[float, ...] | None, tuple[float, ...] | None]
"""Four factors, which the toys take in turn, before `MIDDLE` and from there on; None where no factor acts."""
NEVER: Factors = (None, None)
ONES: Factors = ((1.0,) * 4, (1.0,) * 4)
ONES_LATER: Factors = (None, ONES[1])
CHANGING: Factors = ((0.5, 1.5, 0.75, 1.25), (1.75, 0.6, 1.4, 0.8))
CHANGING_LATER: Factors = (None, CHANGING[1])
EVERY_SECOND: tuple[Factors, Factors] = (
    ((0.5, 1.0, 0.75, 1.0), (1.75, 1.0, 1.4, 1.0)),
    ((1.0, 1.5, 1.0, 1.25), (1.0, 0.6, 1.0, 0.8)),
)


@dataclass(frozen=True)
class Verdict:
    """The result of a trial. Each reason is a phrase that follows the optimizer's name.

    Args:
        lr: Why `apply="lr"` cannot work; None if it can.
        update: Why `apply="update"` cannot work; None if it can.
        groups: Why parameter groups must not be divided; None if they may.
        scales_rate: Whether scaled writes are what permanent groups with other rates give.
        scales_update: Whether scaled writes are what a scaled update gives.
        untried: Why the trial could not run; None if it could.
        permanent: Whether permanent groups with different rates work.
        scaleless: Whether a factor on the gradients has almost no effect.
        replaces: Whether a step replaces the parameter groups.
        communicates: Whether a step communicates with other processes.
        process_group: The first process group that the step uses; None for the default one.
    """

    lr: str | None = None
    update: str | None = None
    groups: str | None = None
    scales_rate: bool = False
    scales_update: bool = False
    untried: str | None = None
    permanent: bool = True
    scaleless: bool = False
    replaces: bool = False
    communicates: bool = False
    process_group: Any = None


IGNORES_RATES = (
    "does not read the rates of its parameter groups (in a trial on toy parameters a factor on them did nothing)"
)
ONE_RATE = "takes the rate of one of its parameter groups for the parameters of others (in a trial on toy parameters)"
SETS_RATES = "sets the rates of its parameter groups itself (in a trial on toy parameters)"
TOGETHER = (
    "treats the parameters of a group together (in a trial on toy parameters its steps came out differently when the "
    "group was divided)"
)
OWN_WEIGHTS = (
    "keeps weights of its own and takes the parameters back towards them (in a trial on toy parameters it undid a "
    "shift of the weights), so a scaled step would be undone"
)
KEEPS_ROUNDING = (
    "keeps more in its state where weights are of half precision (in a trial on toy parameters), such as what rounding "
    "has lost, so a scaled step would be lost or undone"
)
REPLACED = "replaces its parameter groups in its step"
FOLLOWS_RATE = "keeps numbers in its parameter groups that follow from the rate"
MAY_PARTITION = (
    "communicates in its step, so the processes may share the parameters of a group out by their positions in it"
)
OTHER_RATE = (
    "takes other steps at rates that come with a step than in permanent groups with these rates (in a trial on toy "
    "parameters)"
)


def reason_against(optimizer: Optimizer, where: Where) -> str | None:
    """Return why a factor cannot act at a place, from the known classes or from a trial; None if it can."""
    reason = known_reason(optimizer, where)
    if reason is None and where != "anywhere" and (verdict := verdict_of(optimizer)) is not None:
        reason = getattr(verdict, where)
    return reason


def divides_by_gradients(optimizer: Optimizer) -> bool:
    """Tell whether the scale of the gradients has almost no effect on the optimizer."""
    if known_to_divide(optimizer):
        return True
    verdict = verdict_of(optimizer)
    return verdict is not None and verdict.scaleless


def in_own_groups(optimizer: Any) -> str:
    """Return how to build the optimizer with a parameter group for each layer."""
    return f"{type(optimizer).__name__}(layerwise.param_groups(model), …)"


def verdict_of(optimizer: Optimizer) -> Verdict | None:
    """Return the result of the optimizer's trial; None for one of PyTorch's own."""
    if not is_foreign(type(optimizer)):
        return None
    known = _of_optimizer.get(id(optimizer))
    if known is not None and known[0]() is optimizer:
        return known[1]
    if any(not has_values(p) or runs_on_fakes(p) for group in optimizer.param_groups for p in group["params"][:1]):
        return Verdict()  # no trial before the parameters have values
    verdict = _tried(optimizer)
    key = id(optimizer)
    _of_optimizer[key] = (weakref.ref(optimizer, lambda _: _of_optimizer.pop(key, None)), verdict)
    return verdict


def try_again(optimizer: Any) -> None:
    """Forget the verdict of an optimizer whose groups have changed; verdicts of settings stay cached."""
    _of_optimizer.pop(id(optimizer), None)


_of_optimizer: dict[int, tuple[weakref.ref[Any], Verdict]] = {}
_of_setting: dict[Any, Verdict] = {}


def _tried(optimizer: Any) -> Verdict:
    key = _setting(optimizer)
    if key not in _of_setting:
        verdicts = (_attempt(optimizer, *arguments) for arguments in ATTEMPTS)
        first = next(verdicts)  # gives the reason if every attempt fails
        _of_setting[key] = next((one for one in chain([first], verdicts) if one.untried is None), first)
    return _of_setting[key]


def _setting(optimizer: Optimizer) -> Any:
    """Return the cache key: all that a trial's outcome depends on."""
    plain = {bool, int, float, str, tuple, type(None)}

    def simple(options: Mapping[str, Any]) -> Any:
        shown = {name: type(value) in plain and name != "lr" for name, value in options.items()}
        return sorted((str(k), repr(v) if shown[k] else type(v).__name__) for k, v in options.items())

    def traits(p: Tensor) -> Any:
        return min(p.ndim, 4), p.dtype, p.device.type, p.requires_grad, min(p.shape, default=1) > 1

    groups = [
        (simple({**group, "params": len(group["params"][:8])}), list(map(traits, group["params"][:8])))
        for group in optimizer.param_groups
    ]
    processes = torch.distributed.get_world_size() if several_processes() else 1
    return type(optimizer), repr((groups, simple(attributes_of(optimizer)), processes)), bool(optimizer.state)


def _attempt(optimizer: Any, construct: bool, double: bool, way: str) -> Verdict:
    """Try an optimizer; if that fails, the verdict's `untried` says why.

    Args:
        optimizer: The optimizer.
        construct: Whether twins are built by the class's constructor.
        double: Whether toys are float64, which separates rounding from real differences.
        way: How steps are called, see `Workshop`.
    """
    parameters = parameters_of(optimizer)
    dtype = torch.float64 if double and not any(p.is_complex() for p in parameters) else None
    make = partial(Workshop, optimizer, construct=construct, way=way)
    workshop, wider = make(dtype), make(dtype, side=WIDE)
    # Some optimizers keep float32 copies of the weights, or what rounding loses, only for those of half precision.
    narrow = None if dtype is None or HALF.isdisjoint(p.dtype for p in parameters) else make(None)
    with undisturbed(parameters) as guard:
        try:
            trial = Trial(workshop, guard, wider)
            verdict = trial.verdict()
            return verdict if narrow is None else Trial(narrow, guard).narrowed(verdict, trial)
        except Exception as error:
            reason = guard.stopped or error
    if isinstance(reason, CommunicatesError):
        return Verdict(groups=MAY_PARTITION, communicates=True, process_group=reason.group)
    text = str(reason).strip().partition("\n")[0]
    why = text if isinstance(reason, CannotTryError) else f"{type(reason).__name__}: {text}"
    unknown = f"cannot be tried on toy parameters ({why}), so whether factors act as they should is not known"
    return Verdict(lr=unknown, update=unknown, untried=why)


Run = list[list[Tensor]]
"""The toys before the first step and after each step."""


@dataclass(frozen=True)
class Plan:
    """How to run a twin.

    Args:
        factors: The factors.
        how: Where they act. `"groups"` divides the groups of each step, as `apply="lr"` does. So does `"own"`, where
            each toy has a permanent group, and `"permanent"` sets the rates of such groups in place. Where groups stay
            whole, they act on the `"writes"` of a step, or when it is `"finished"`.
        steps: The number of steps.
        large: Whether the toys are large.
        decay: Whether weight decay is on.
        shift_at: The step before which 1 is added to the weights.
        gradient: Multiplies the gradients.
    """

    factors: Factors = NEVER
    how: Literal["groups", "own", "permanent", "writes", "finished"] = "groups"
    steps: int = STEPS
    large: bool = False
    decay: bool = True
    shift_at: int | None = None
    gradient: float = 1.0


BARE = Plan()


class Trial:
    """One trial.

    Args:
        workshop: Makes the twins.
        guard: Stops forbidden operations, and records the reason.
        wider: Makes twins with wider toys.
    """

    def __init__(self, workshop: Workshop, guard: Guard, wider: Workshop | None = None) -> None:
        self.workshop, self.guard, self.wider = workshop, guard, wider
        self.limits = max(LIMITS.get(dtype, Limits()) for dtype in workshop.dtypes)
        self.replaces = False
        self.copies = False
        self.writes_options = False
        self.state: set[tuple[str, str]] = set()
        self.failure = ""
        self._runs: dict[Plan, Run] = {}

    def verdict(self) -> Verdict:
        """Run the trial."""
        bare = self.run(BARE)
        if all(torch.equal(a, b) for a, b in zip(bare[0], bare[-1], strict=True)):
            raise CannotTryError("the toy parameters did not move")
        update = self.against_update()
        scales_update = update is None and self.writes_equal("finished")
        verdict = Verdict(update=update, scales_update=scales_update, scaleless=self.is_scaleless())
        if any(group.get("lr") is None for group in self.workshop.optimizer.param_groups):
            return verdict
        if self.replaces:
            return replace(verdict, lr=REPLACED, groups=REPLACED, replaces=True)
        return replace(verdict, scales_rate=self.writes_equal("permanent"), **self.against_rates(bare))

    def narrowed(self, verdict: Verdict, wide: Trial) -> Verdict:
        """Return the verdict for half precision, from that of float64."""
        update = verdict.update or self.against_update()
        if update is None:
            self.run(BARE)
            update = KEEPS_ROUNDING if self.state != wide.state else None
        return replace(
            verdict,
            update=update,
            scales_rate=verdict.scales_rate and self.writes_equal("permanent"),
            scales_update=verdict.scales_update and update is None and self.writes_equal("finished"),
        )

    def writes_equal(self, how: Literal["finished", "permanent"]) -> bool:
        """Tell whether scaled writes are what another way of scaling gives.

        That must hold for large weights too, since some steps limit weights, which small ones do not reach.
        """
        for steps, large in ((LONG if self.copies else STEPS, False), (LARGE_STEPS, True)):
            writes = self.attempt(Plan(CHANGING, "writes", steps, large))
            if writes is None:
                return False
            other = self.attempt(Plan(CHANGING, how, steps, large))
            alone = self.attempt(Plan(steps=min(steps, STEPS), large=large))
            if not self.same(writes, other, alone, self.limits.equal):
                return False
        return True

    def against_rates(self, bare: Run) -> dict[str, Any]:
        """Return the fields of the verdict about `apply="lr"` and permanent groups."""
        groups = self.against_division(bare)
        permanent = self.attempt(Plan(CHANGING, "permanent"))
        failure = self.failure
        neutral = bare
        if groups or permanent is None:
            neutral = self.attempt(Plan(ONES_LATER, "permanent"))
        if neutral is None:
            return {"groups": groups}
        if permanent is None:
            return {"groups": groups, "lr": failure, "permanent": False}
        if not self.moves(neutral, permanent):
            return {"groups": groups, "lr": IGNORES_RATES, "permanent": False}
        for first, factors in enumerate(EVERY_SECOND):
            if not self.moves(neutral, self.run(Plan(factors, "permanent")), slice(first, None, 2)):
                return {"groups": groups, "lr": ONE_RATE, "permanent": False}
        if groups:
            return {"groups": groups, "lr": self.against_own_groups(permanent, neutral)}
        for factors in (CHANGING, CHANGING_LATER):
            with_step = self.attempt(Plan(factors))
            if with_step is None:
                return {"groups": FOLLOWS_RATE, "lr": self.against_own_groups(permanent, neutral)}
            if not self.same(with_step, self.run(Plan(factors, "permanent")), bare):
                return {"lr": OTHER_RATE}
        if not self.moves(bare, self.run(Plan(CHANGING_LATER, "permanent"))):
            return {"lr": "reads the rates of its parameter groups in its first steps only"}
        return {}

    def against_own_groups(self, permanent: Run, scale: Run) -> str | None:
        """Return why `apply="lr"` cannot work even where each toy has a permanent group of its own."""
        result = self.attempt(Plan(CHANGING, "own"))
        if result is None:
            return SETS_RATES
        return None if self.same(result, permanent, scale) else OTHER_RATE

    def against_division(self, bare: Run) -> str | None:
        """Return why groups must not be divided: at factor 1 their division changes the steps."""
        # Options that come to differ between the parts of a group raise. Rounding grows in so many steps.
        divided = self.attempt(Plan(ONES_LATER, steps=LONG if self.writes_options else STEPS))
        return TOGETHER if not self.same(divided, bare, bare) or self.joins_wide_toys() else None

    def joins_wide_toys(self) -> bool:
        """Tell whether division changes steps on wider toys, since some join only matrices above a size."""
        if self.wider is None or self.wider.side == self.workshop.side:
            return False
        trial = Trial(self.wider, self.guard)
        whole = trial.attempt(Plan(steps=WIDE_STEPS))
        if whole is None:  # some steps on matrices of this size must be compiled
            return False
        # Iterations in half precision over stacks of other heights round otherwise.
        return not trial.same(trial.attempt(Plan(ONES, steps=WIDE_STEPS)), whole, whole, Limits().rounding)

    def against_update(self) -> str | None:
        """Return why a finished step cannot be scaled: later steps take the weights back.

        A shift of the weights must last. The run is longer where the state holds copies of the weights.
        """
        steps = LONG if self.copies else STEPS
        bare = self.run(Plan(decay=False, steps=steps))
        for at in (1,) if self.copies else (1, STEPS // 2):
            shifted = self.run(Plan(decay=False, steps=steps, shift_at=at))
            for toy, real in enumerate(self.workshop.real):
                left = [float((s[toy] - b[toy]).double().mean()) for s, b in zip(shifted, bare, strict=True)][at + 1 :]
                changes = (now - before for before, now in pairwise([1.0, *left]))
                if real.requires_grad and min(changes) < -MOST_UNDONE:
                    return OWN_WEIGHTS
        return None

    def is_scaleless(self) -> bool:
        """Tell whether doubled gradients leave the steps as they are, without weight decay."""
        bare, doubled = (self.run(Plan(decay=False, gradient=scale)) for scale in (1.0, 2.0))
        return self.same(doubled, bare, bare, SCALELESS)

    # --- Runs ---------------------------------------------------------------------------------------------------------

    def run(self, plan: Plan) -> Run:
        """Return the run of a new twin. Each plan runs once."""
        if plan not in self._runs:
            self._runs[plan] = self._new_run(plan)
        return self._runs[plan]

    def attempt(self, plan: Plan) -> Run | None:
        """Return the run of a new twin; None if a step fails, and `failure` then says how."""
        try:
            return self.run(plan)
        except Exception as error:
            self.check()
            text = str(error).strip().partition("\n")[0]
            self.failure = f"cannot step with different rates in its parameter groups ({type(error).__name__}: {text})"
            return None

    def _new_run(self, plan: Plan) -> Run:
        optimizer, toys = self.workshop.twin(decay=plan.decay)
        bare = plan.factors == NEVER
        options = list(map(_options_of, optimizer.param_groups))
        partition = Partition({id(p): number for number, p in enumerate(toys)})
        if plan.how in ("own", "permanent"):
            divide(optimizer, partition, None)
        rates = [group.get("lr") for group in optimizer.param_groups]
        if plan.large:
            _move(toys, LARGE, 0.0)
        run = [_copies(toys)]
        for number in range(plan.steps):
            in_turn = plan.factors[number >= MIDDLE]
            factors = None if in_turn is None else [in_turn[toy % len(in_turn)] for toy in range(len(toys))]
            splits: list[Any] = []
            whole = optimizer.param_groups
            if factors is not None and plan.how == "permanent":
                for group, rate in zip(whole, rates, strict=True):
                    group["lr"] = rate * factors[partition.layer_of[id(group["params"][0])]]
            elif factors is not None and plan.how in ("groups", "own"):
                splits = divide(optimizer, partition, factors)
            if number == plan.shift_at:
                _move([p for p in toys if p.requires_grad], 1.0, 1.0)
            given, members = optimizer.param_groups, _members(optimizer)
            writes = factors if plan.how == "writes" else None
            self.workshop.step(optimizer, toys, number, plan.gradient, writes)
            if factors is not None and plan.how == "finished":
                with torch.no_grad():
                    for p, old, factor in zip(toys, run[-1], factors, strict=True):
                        p.copy_(old + factor * (p - old))
            self.check()
            self.replaces |= optimizer.param_groups is not given or members != _members(optimizer)
            if splits:
                optimizer.param_groups = whole
                write_back(splits, type(optimizer).__name__)
            run.append(_copies(toys))
            if bare and number < 3:
                self.copies |= holds_copies(optimizer, [*run[-2], *run[-1]])
                for state in list(optimizer.state.values()):
                    items = cast("dict[Any, Any]", state).items() if isinstance(state, dict) else ()
                    self.state |= {(str(name), type(value).__name__) for name, value in items}
        if bare:
            self.writes_options |= options != list(map(_options_of, optimizer.param_groups))
        return run

    def check(self) -> None:
        """Raise the guard's exception again, in case the step has caught it."""
        if self.guard.stopped is not None:
            raise self.guard.stopped

    # --- Comparisons --------------------------------------------------------------------------------------------------

    def same(self, first: Run | None, second: Run | None, scale: Run | None, limit: float | None = None) -> bool:
        """Tell whether runs, none of which failed, differ at most by a limit, which is rounding if it is not given."""
        if first is None or second is None or scale is None:
            return False
        limit = self.limits.rounding if limit is None else limit
        return not any(apart > limit for apart in distances(first, second, scale))

    def moves(self, bare: Run, with_factors: Run, toys: slice = slice(None)) -> bool:
        """Tell whether factors had an effect on each moving toy among these."""
        return not any(apart < self.limits.effect for apart in distances(with_factors, bare, bare)[toys])


def distances(first: Run, second: Run, scale: Run) -> list[float]:
    """Return how far each toy comes apart in the steps of both runs, relative to how far it moves in `scale`.

    It is NaN for a toy that rests, and infinite where only one run moves it, or where values are NaN.
    """
    found: list[float] = []
    for toy in range(len(first[0])):
        way = max(float((step[toy] - scale[0][toy]).abs().max()) for step in scale)
        gaps = [float((a[toy] - b[toy]).abs().max()) for a, b in zip(first, second, strict=False)]
        apart = math.inf if any(map(math.isnan, gaps)) else max(gaps)
        found.append(apart / way if way else math.inf if apart else math.nan)
    return found


@torch.no_grad()
def _move(toys: Sequence[Tensor], scale: float, shift: float) -> None:
    for p in toys:
        p.mul_(scale).add_(shift)


def _copies(toys: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in toys]


def _members(optimizer: Any) -> list[int]:
    return list(map(id, parameters_of(optimizer)))


def _options_of(group: dict[str, Any]) -> Any:
    return mark({name: value for name, value in group.items() if name not in ("params", "lr")})


def divide(twin: Any, partition: Partition, factors: Sequence[float] | None) -> list[Any]:
    """Give each toy a group of its own, as `apply="lr"` does; return the splits."""

    def alone(of_layer: Any) -> Any:
        return of_layer.items()

    def rate(group: Any, toy: int) -> dict[str, Any]:
        return {} if factors is None or factors[toy] == 1 else {"lr": group["lr"] * factors[toy]}

    splits = partition.split(twin, alone, rate)
    for split in splits:
        split.remember()
    return cast("list[Any]", splits)


def holds_copies(optimizer: Any, weights: Sequence[Tensor]) -> bool:
    """Tell whether the optimizer's state holds a copy of one of the weights."""
    return any(is_copy(tensor, weights) for tensor in tensors_in(optimizer.state, 2))


def is_copy(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    """Tell whether a tensor equals one of the weights and is another object."""
    if tensor.numel() < 2 or tensor.is_complex() or any(tensor is w for w in weights):
        return False
    flat = tensor.detach().flatten()
    if bool((flat == flat[0]).all()):  # zeros or ones, which biases often begin with
        return False
    return any(
        w.numel() == flat.numel() and torch.equal(flat.to(w.device, w.dtype), w.detach().flatten()) for w in weights
    )
