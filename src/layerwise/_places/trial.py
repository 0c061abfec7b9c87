"""Tests on small toy parameters where a factor can act on an optimizer of another package.

Each class is tried once for each setting: runs of twelve or more steps of a copy (the twin) on a few tiny tensors, 0.1
to 2 s of CPU time. Parameter groups with fixed rates are the reference. The trial answers three questions. May a group
be divided? Does a rate that changes with each step act as the same rate of a permanent group does? Does a scaled step
last, or does the optimizer take the weights back?
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors import has_values, runs_on_fakes, several_processes
from ..apply import Partition, mark, write_back
from ..optimizers import Where, is_foreign, known_reason, known_to_divide
from .toys import WIDE, CannotTryError, CommunicatesError, Guard, Twin, Workshop, attributes_of, tensors_in, undisturbed

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
EARLY, LATER = (0.5, 1.5, 0.75, 1.25), (1.75, 0.6, 1.4, 0.8)
"""The factors of the toys, in turn, before and after `MIDDLE`."""
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-2}
"""The largest difference of two runs that counts as rounding, relative to how far the weights move.

Other types take `COARSE`.
"""
EQUAL = {torch.float64: 1e-9, torch.float32: 1e-3}
"""The largest such difference between scaled writes and another way of scaling."""
EFFECT = {torch.float64: 1e-5, torch.float32: 1e-3}
"""The smallest difference that counts as an effect of the factors, relative to how far the weights move."""
COARSE = 0.05
HALF = {torch.float16, torch.bfloat16}
MOST_UNDONE = 0.03
"""The largest part of a shift of the weights that a step may undo.

An optimizer that undoes more keeps weights of its own.
"""
SCALELESS = 0.005
"""The largest effect of doubled gradients on an optimizer that divides by them, relative to how far weights move."""


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
COPIES = "keeps copies of the weights, from which it may compute the next ones, and cannot be tried on toy parameters"
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
        verdicts = (
            _attempt(optimizer, construct, wide, way)
            for construct, wide, way in product((False, True), (True, False), ("plain", "closure", "graph"))
        )
        first = next(verdicts)  # gives the reason if every attempt fails
        _of_setting[key] = next((one for one in chain([first], verdicts) if one.untried is None), first)
    return _of_setting[key]


def _setting(optimizer: Optimizer) -> Any:
    """Return the cache key: all that a trial's outcome depends on."""

    def simple(options: dict[str, Any]) -> tuple[Any, ...]:
        kept = {bool, int, float, str, tuple, type(None)}
        return tuple(
            (name, repr(value) if type(value) in kept and name != "lr" else type(value).__name__)
            for name, value in sorted(options.items(), key=lambda item: str(item[0]))
            if name != "params"
        )

    groups = tuple(
        (
            simple(group),
            tuple(
                (min(p.ndim, 4), p.dtype, p.device.type, p.requires_grad, min(p.shape, default=1) > 1)
                for p in group["params"][:8]
            ),
            min(len(group["params"]), 8),
        )
        for group in optimizer.param_groups
    )
    processes = torch.distributed.get_world_size() if several_processes() else 1
    return type(optimizer), groups, simple(attributes_of(optimizer)), processes, bool(optimizer.state)


def _attempt(optimizer: Any, construct: bool, wide: bool, way: str) -> Verdict:
    """Try an optimizer; if that fails, the verdict's `untried` says why.

    Args:
        optimizer: The optimizer.
        construct: Whether twins are built by the class's constructor.
        wide: Whether toys are float64, which separates rounding from real differences.
        way: How steps are called, see `Workshop`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dtype = torch.float64 if wide and not any(p.is_complex() for p in parameters) else None
    workshop = Workshop(optimizer, dtype, construct=construct, way=way)
    wider = Workshop(optimizer, dtype, construct=construct, way=way, side=WIDE)
    with undisturbed(parameters) as guard:
        try:
            verdict = Trial(workshop, guard, wider if wider.side > workshop.side else None).verdict()
            if dtype is not None and not HALF.isdisjoint(p.dtype for p in parameters):
                # Some optimizers keep float32 copies of the weights only where these are of half precision.
                own = Trial(Workshop(optimizer, None, construct=construct, way=way), guard)
                verdict = replace(verdict, update=verdict.update or own.against_update())
            return verdict
        except Exception as error:
            reason = guard.stopped or error
    if isinstance(reason, CommunicatesError):
        return Verdict(groups=MAY_PARTITION, communicates=True, process_group=reason.group)
    text = str(reason).strip().partition("\n")[0]
    why = text if isinstance(reason, CannotTryError) else f"{type(reason).__name__}: {text}"
    return Verdict(
        lr=f"cannot be tried on toy parameters ({why}), so whether a factor on its rate acts is not known",
        update=COPIES if keeps_copies(optimizer) else None,
        untried=why,
    )


Run = list[list[Tensor]]
"""The toys before the first step and after each step."""


class Trial:
    """One trial.

    Args:
        workshop: Makes the twins.
        guard: Stops forbidden operations, and records the reason.
        wider: Makes twins with wider toys; None where the toys are as wide as the parameters.
    """

    def __init__(self, workshop: Workshop, guard: Guard, wider: Workshop | None = None) -> None:
        self.workshop, self.guard, self.wider = workshop, guard, wider
        self.replaces = False
        self.copies = False
        self.writes_options = False

    def verdict(self) -> Verdict:
        """Run the trial."""
        bare = self.run(None)
        if all(torch.equal(a, b) for a, b in zip(bare[0], bare[-1], strict=True)):
            raise CannotTryError("the toy parameters did not move")
        update, writes = self.against_update(), self.scaled_writes()
        scales_update = update is None and self.are_as(writes, bare, how="finished")
        verdict = Verdict(update=update, scales_update=scales_update, scaleless=self.is_scaleless())
        if any(group.get("lr") is None for group in self.workshop.optimizer.param_groups):
            return verdict
        if self.replaces:
            return replace(verdict, lr=REPLACED, groups=REPLACED, replaces=True)
        return replace(verdict, scales_rate=self.are_as(writes, bare, permanent=True), **self.against_rates(bare))

    def scaled_writes(self) -> Run | None:
        """Return a run in which the writes of steps are scaled; None where that is not possible."""
        try:
            return self.run(in_all_steps, how="writes", steps=LONG if self.copies else STEPS)
        except Exception:
            self.check()
            return None

    def are_as(self, writes: Run | None, bare: Run, **way: Any) -> bool:
        """Tell whether scaled writes are what another way of scaling gives, with large weights too.

        Some steps limit weights, which small ones do not reach.
        """
        if writes is None:
            return False
        try:
            if not self.same(writes, self.run(in_all_steps, steps=len(writes) - 1, **way), bare, EQUAL):
                return False
            ways: list[dict[str, Any]] = [{"how": "writes"}, way, {"factors": None}]
            run: Any = self.run
            large, other, alone = (
                run(**{"factors": in_all_steps, "steps": LARGE_STEPS, "large": True, **one}) for one in ways
            )
        except Exception:
            self.check()
            return False
        return self.same(large, other, alone, EQUAL)

    def against_rates(self, bare: Run) -> dict[str, Any]:
        """Return the fields of the verdict about `apply="lr"` and permanent groups."""
        groups = self.against_division(bare)
        try:
            permanent = self.run(in_all_steps, permanent=True)
        except Exception as error:
            self.check()
            return {"groups": groups} | ({"lr": failure_of(error), "permanent": False} if self.takes_groups() else {})
        neutral = self.run(all_ones, permanent=True) if groups else bare
        moves = self.moves(neutral, permanent)
        if not moves:
            return {"groups": groups, "lr": IGNORES_RATES, "permanent": False}
        for first in (0, 1):
            every_second = self.run(partial(for_every_second, first), permanent=True)
            if not self.moves(neutral, every_second, first, 2):
                return {"groups": groups, "lr": ONE_RATE, "permanent": False}
        if groups:
            return {"groups": groups, "lr": self.against_own_groups(permanent, neutral)}
        for factors in (in_all_steps, in_later_steps):
            try:
                with_step = self.run(factors)
            except Exception:
                self.check()
                return {"groups": FOLLOWS_RATE, "lr": self.against_own_groups(permanent, neutral)}
            expected = permanent if factors is in_all_steps else self.run(in_later_steps, permanent=True)
            if not self.same(with_step, expected, bare):
                return {"groups": None, "lr": OTHER_RATE}
            if factors is in_later_steps and not self.moves(bare, expected):
                return {"groups": None, "lr": "reads the rates of its parameter groups in its first steps only"}
        return {}

    def against_own_groups(self, permanent: Run, scale: Run) -> str | None:
        """Return why `apply="lr"` cannot work even where each toy has a permanent group of its own."""
        try:
            result = self.run(in_all_steps, own=True)
        except Exception:
            self.check()
            return SETS_RATES
        return None if self.same(result, permanent, scale) else OTHER_RATE

    def takes_groups(self) -> bool:
        """Tell whether steps succeed with a permanent group for each toy, all at factor 1."""
        try:
            self.run(all_ones, permanent=True)
        except Exception:
            self.check()
            return False
        return True

    def against_division(self, bare: Run) -> str | None:
        """Return why groups must not be divided: at factor 1 their division changes the steps."""
        try:
            # Options that come to differ between the parts of a group raise. Rounding grows in so many steps.
            divided = self.run(all_ones, steps=LONG if self.writes_options else STEPS)
        except Exception:
            self.check()
            return TOGETHER
        if not self.same(divided[: len(bare)], bare, bare) or self.joins_wide_toys():
            return TOGETHER
        return None

    def joins_wide_toys(self) -> bool:
        """Tell whether division changes steps on wider toys, since some join only matrices above a size."""
        if self.wider is None:
            return False
        trial = Trial(self.wider, self.guard)
        try:
            whole = trial.run(None, steps=WIDE_STEPS)
        except Exception:  # some steps on matrices of this size must be compiled
            self.check()
            return False
        try:
            divided = trial.run(ones, steps=WIDE_STEPS)
        except Exception:
            self.check()
            return True
        # Iterations in half precision over stacks of other heights round otherwise.
        return self.distances(divided, whole, whole) > COARSE

    def against_update(self) -> str | None:
        """Return why a finished step cannot be scaled: later steps take the weights back.

        A shift of the weights must last. The run is longer where the state holds copies of the weights.
        """
        steps = LONG if self.copies else STEPS
        bare = self.run(None, decay=False, steps=steps)
        for at in (1,) if self.copies else (1, STEPS // 2):
            shifted = self.run(None, decay=False, steps=steps, shift_at=at)
            for toy, real in enumerate(self.workshop.real):
                if not real.requires_grad:
                    continue
                left = [float((s[toy] - b[toy]).double().mean()) for s, b in zip(shifted, bare, strict=True)][at + 1 :]
                before = [1.0, *left[:-1]]
                if min((now - then for now, then in zip(left, before, strict=True)), default=0.0) < -MOST_UNDONE:
                    return OWN_WEIGHTS
        return None

    def is_scaleless(self) -> bool:
        """Tell whether doubled gradients leave the steps as they are, without weight decay."""
        bare, doubled = (self.run(None, decay=False, gradient=scale) for scale in (1.0, 2.0))
        return self.distances(doubled, bare, bare) <= SCALELESS

    # --- Runs ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        factors: Callable[[int], Sequence[float] | None] | None,
        *,
        permanent: bool = False,
        own: bool = False,
        how: Literal["groups", "writes", "finished"] = "groups",
        large: bool = False,
        decay: bool = True,
        steps: int = STEPS,
        shift_at: int | None = None,
        gradient: float = 1.0,
    ) -> Run:
        """Return the toys after each step of a new twin.

        Args:
            factors: A function from a step's number to the toys' factors, or to None for undivided groups. None never
                divides groups.
            permanent: Whether each toy has a permanent group whose rate is set in place.
            own: Whether each toy has a permanent group, and factors act as `apply="lr"` does.
            how: Where groups stay whole, factors act on the `"writes"` of a step, or when it is `"finished"`.
            large: Whether the toys are large.
            decay: Whether weight decay is on.
            steps: The number of steps.
            shift_at: The step before which 1 is added to the weights.
            gradient: Multiplies the gradients.
        """
        twin = self.workshop.twin(decay=decay)
        options = [_options_of(group) for group in twin.optimizer.param_groups]
        partition = Partition({id(p): number for number, p in enumerate(twin.toys)})
        rates: list[Any] = []
        order: list[int] = []
        if permanent or own:
            divide(twin, partition, None)
            rates = [group.get("lr") for group in twin.optimizer.param_groups]
            order = [partition.layer_of[id(group["params"][0])] for group in twin.optimizer.param_groups]
        if large:
            with torch.no_grad():
                for p in twin.toys:
                    p.mul_(LARGE)
        run = [twin.weights()]
        for number in range(steps):
            now = None if factors is None else factors(number)
            splits: list[Any] = []
            whole = twin.optimizer.param_groups
            if permanent:
                for group, rate, toy in zip(whole, rates, order, strict=True):
                    if now is not None:
                        group["lr"] = rate * now[toy]
            elif now is not None and how == "groups":
                splits = divide(twin, partition, now)
            if number == shift_at:
                with torch.no_grad():
                    for p in twin.toys:
                        if p.requires_grad:
                            p.add_(1.0)
            before = [id(p) for group in twin.optimizer.param_groups for p in group["params"]]
            given = twin.optimizer.param_groups
            twin.take(number, gradient=gradient, writes=now if how == "writes" else None)
            if how == "finished" and now is not None:
                with torch.no_grad():
                    for p, old, factor in zip(twin.toys, run[-1], now, strict=False):
                        p.copy_(old + factor * (p - old))
            self.check()
            after = twin.optimizer.param_groups
            self.replaces |= after is not given or before != [id(p) for group in after for p in group["params"]]
            if splits:
                twin.optimizer.param_groups = whole
                write_back(splits, type(twin.optimizer).__name__)
            run.append(twin.weights())
            if factors is None and number < 3:
                self.copies |= holds_copies(twin.optimizer, [*run[-2], *run[-1]])
        if factors is None:
            self.writes_options |= options != [_options_of(group) for group in twin.optimizer.param_groups]
        return run

    def check(self) -> None:
        """Raise the guard's exception again, in case the step has caught it."""
        if self.guard.stopped is not None:
            raise self.guard.stopped

    # --- Comparisons --------------------------------------------------------------------------------------------------

    def same(self, first: Run, second: Run, scale: Run, limits: Mapping[torch.dtype, float] = ROUNDING) -> bool:
        """Tell whether two runs differ by rounding only."""
        dtypes = {t.dtype for t in first[0] if t.is_floating_point() or t.is_complex()}
        return self.distances(first, second, scale) <= max(limits.get(dtype, COARSE) for dtype in dtypes)

    @staticmethod
    def distances(first: Run, second: Run, scale: Run) -> float:
        """Return the largest difference of a toy between two runs, relative to how far it moves in `scale`."""
        largest = 0.0
        for toy in range(len(first[0])):
            way = max(float((step[toy] - scale[0][toy]).abs().max()) for step in scale)
            apart = max(float((a[toy] - b[toy]).abs().max()) for a, b in zip(first, second, strict=True))
            if apart != apart or (apart > 0 and way == 0):
                return float("inf")
            largest = max(largest, apart / way if way else 0.0)
        return largest

    def moves(self, bare: Run, with_factors: Run, first: int = 0, stride: int = 1) -> bool:
        """Tell whether factors had an effect on each moving toy, of every `stride`-th toy from `first` on."""
        for toy in range(first, len(bare[0]), stride):
            way = max(float((step[toy] - bare[0][toy]).abs().max()) for step in bare)
            apart = max(float((a[toy] - b[toy]).abs().max()) for a, b in zip(bare, with_factors, strict=True))
            if way and apart < EFFECT.get(bare[0][toy].dtype, COARSE) * way:
                return False
        return True


def ones(step: int) -> Sequence[float]:
    """Return factors of 1."""
    return [1.0] * 1000


def all_ones(step: int) -> Sequence[float] | None:
    """Return factors of 1 from `MIDDLE` on."""
    return ones(step) if step >= MIDDLE else None


def in_all_steps(step: int) -> Sequence[float]:
    """Return factors from the first step on, which change at `MIDDLE`."""
    return (EARLY if step < MIDDLE else LATER) * 250


def for_every_second(first: int, step: int) -> Sequence[float]:
    """Return factors for every second toy, and 1 for the others."""
    return [factor if toy % 2 == first else 1.0 for toy, factor in enumerate(in_all_steps(step))]


def in_later_steps(step: int) -> Sequence[float] | None:
    """Return factors from `MIDDLE` on."""
    return LATER * 250 if step >= MIDDLE else None


def _options_of(group: dict[str, Any]) -> Any:
    return mark({name: value for name, value in group.items() if name not in ("params", "lr")})


def divide(twin: Twin, partition: Partition, factors: Sequence[float] | None) -> list[Any]:
    """Give each toy a group of its own, as `apply="lr"` does; return the splits."""

    def alone(of_layer: Any) -> Any:
        return of_layer.items()

    def rate(group: Any, toy: int) -> dict[str, Any]:
        return {} if factors is None or factors[toy] == 1 else {"lr": group["lr"] * factors[toy]}

    splits = partition.split(twin.optimizer, alone, rate)
    for split in splits:
        split.remember()
    return cast("list[Any]", splits)


def keeps_copies(optimizer: Any) -> bool:
    """Tell whether the optimizer holds copies of its parameters, in its state or in its attributes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return holds_copies(optimizer, parameters) or any(
        is_copy(tensor, parameters)
        for name, value in attributes_of(optimizer).items()
        if name not in ("state", "param_groups")
        for tensor in tensors_in(value, 3)
    )


def holds_copies(optimizer: Any, weights: Sequence[Tensor]) -> bool:
    """Tell whether the optimizer's state holds a copy of one of the weights."""
    return any(
        is_copy(value, weights)
        for held in optimizer.state.values()
        if isinstance(held, dict)
        for value in cast("dict[Any, Any]", held).values()
    )


def is_copy(value: Any, weights: Sequence[Tensor]) -> bool:
    """Tell whether a value is a tensor that equals one of the weights and is another object."""
    if not isinstance(value, Tensor) or value.numel() < 2 or value.is_complex() or any(value is w for w in weights):
        return False
    flat = value.detach().flatten()
    if bool((flat == flat[0]).all()):  # zeros or ones, which biases often begin with
        return False
    return any(
        w.numel() == flat.numel() and torch.equal(flat.to(w.device, w.dtype), w.detach().flatten()) for w in weights
    )


def failure_of(error: Exception) -> str:
    """Return the reason in words, where a step failed with different rates in its groups."""
    text = str(error).strip().partition("\n")[0]
    return f"cannot step with different rates in its parameter groups ({type(error).__name__}: {text})"
