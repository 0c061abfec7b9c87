"""The pair of hooks on an optimizer: `step` runs on a copy, and what it writes is carried over."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial, update_wrapper
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._tensors import has_values, local, same_objects, several_processes, slots_of
from ._writes import STEP, Factor, ScaledWrites, is_compiled
from .apply import Factors, Split, Writes, write_back
from .layers import Layer


def makes_state_only(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a step of an optimizer without state is one of rates and gradients that are all zero.

    `torch.distributed.checkpoint` takes such a step before it reads or writes a state: it gives every parameter a
    gradient of zeros and sets the rates to 0.

    Where several processes train, only its caller tells it from a step of a warm-up that starts at 0. A process may
    hold zeros of a gradient that is not zero elsewhere, so its own values decide nothing for the others. Nor can the
    processes ask each other: a checkpoint may take the step in one process alone, where that process has no state. The
    caller is the same in all processes that take part. One process reads values, where all rates are zero.

    Args:
        groups: The parameter groups.
    """
    if several_processes():
        return _called_by_a_checkpoint()
    if any(map(_moves, groups)):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.requires_grad]
    if any(g is None or g.layout is not torch.strided or not has_values(g) for g in gradients):
        return False
    return not any(bool(local(gradient).detach().count_nonzero()) for gradient in gradients if gradient is not None)


def _called_by_a_checkpoint() -> bool:
    module: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    caller = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    if caller is None:
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not caller:
        frame = frame.f_back
    return frame is not None


def _moves(group: Mapping[str, Any]) -> bool:
    """Return whether a group's rate is not zero, as far as is known without asking a device."""
    rate = group.get("lr")
    unread = isinstance(rate, Tensor) and (rate.device.type != "cpu" or not has_values(rate))
    return rate is None or unread or bool(rate != 0)


# --- Closures --------------------------------------------------------------------------------------------------------


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the closure among the arguments of `step`, of which the first is the optimizer; None if there is none."""
    if len(args) == 1 and not kwargs:
        return None
    name, position = _place_of_closure(cast(Any, type(args[0])))
    closure = kwargs.get(name, args[position] if len(args) > position else None)
    return closure if callable(closure) else None


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `step` with their closure replaced."""
    name, position = _place_of_closure(cast(Any, type(args[0])))
    if name in kwargs:
        return args, {**kwargs, name: closure}
    return (*args[:position], closure, *args[position + 1 :]), kwargs


@cache
def _place_of_closure(kind: Any) -> tuple[str, int]:
    """Return the name and the position of the closure in the signature of a class's `step`."""
    names = list(inspect.signature(kind.step).parameters)
    name = next((name for name in names if "closure" in name), "closure")
    return name, names.index(name) if name in names else 1


def followed(closure: Callable[..., Any], evaluate: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    """Return a closure that calls `evaluate(*given, closure, args, kwargs)` outside of compiled graphs.

    Args:
        closure: The closure.
        evaluate: A function of a module: it is wrapped once, since `torch.compiler.disable` is slow.
        *given: Its first arguments.
    """
    return update_wrapper(partial(_followed, _outside_graph(evaluate), given, closure), closure)


def _followed(evaluate: Callable[..., Any], given: tuple[Any, ...], closure: Any, *args: Any, **kwargs: Any) -> Any:
    return evaluate(*given, closure, args, kwargs)


@cache
def _outside_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], torch.compiler.disable(function))


class WatchedGroups(list[dict[str, Any]]):
    """A list of parameter groups that calls a function before each access.

    Args:
        read: The function.
    """

    def __init__(self, read: Callable[[], None]) -> None:
        super().__init__()
        self._read = read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._read()
        return super().__iter__()

    def __reversed__(self) -> Iterator[dict[str, Any]]:
        self._read()
        return super().__reversed__()

    def __len__(self) -> int:
        self._read()
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        self._read()
        return cast(Any, super().__getitem__(index))

    def __add__(self, other: list[Any]) -> list[Any]:
        self._read()
        return super().__add__(other)

    def __reduce__(self) -> Any:
        return list, ([*self],)


class WatchedGroup(dict[str, Any]):
    """A parameter group that `step` reads before it evaluates its closure.

    Args:
        group: The group.
        note: Called when a value is read that may differ between layers.
        stale: The error message for an access after `end`.
    """

    def __init__(self, group: dict[str, Any], note: Callable[[], None], stale: str) -> None:
        super().__init__(group)
        self._note, self._stale, self._ended = note, stale, False

    def end(self) -> None:
        """Make each later access raise, because other groups have replaced this one."""
        self._ended = True

    def refresh(self, group: dict[str, Any]) -> None:
        """Take over values that the closure has changed in the optimizer's group."""
        super().update(group)

    def _read(self, name: str | None = None) -> None:
        if self._ended:
            raise RuntimeError(self._stale)
        if name in (None, "lr", "weight_decay", "dampening"):
            self._note()

    def __getitem__(self, name: str) -> Any:
        self._read(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value."""
        self._read(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self._read()
        return super().__iter__()

    def items(self) -> Any:
        """Return names and values."""
        self._read()
        return super().items()

    def values(self) -> Any:
        """Return the values."""
        self._read()
        return super().values()


class Kept:
    """Copies of weights and optimizer state, which are restored if a step is refused after it has begun.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        parameters = _parameters_of(optimizer)
        self._weights = [(p, local(p).detach().clone()) for p in parameters]
        self._state = {key: _copied(value) for key, value in optimizer.state.items()}

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> None:
        """Restore weights and optimizer state."""
        for p, value in self._weights:
            local(p).copy_(value)
        optimizer.state.clear()
        optimizer.state.update(self._state)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [_copied(one) for one in cast(list[Any], value)]
    return value


def versions_of(optimizer: Any) -> Sequence[int]:
    """Return the version counters of the parameters, which change with each write in place."""
    return [p._version for p in _parameters_of(optimizer)]


def _parameters_of(optimizer: Any) -> Iterable[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# --- One call of `step` ----------------------------------------------------------------------------------------------

REENTERED = (
    "step() was called within step() of the same optimizer, by a hook or by the step itself, while the factors of a "
    "LayerwiseLR act on the outer step; call it after that step has returned, or detach the adapter"
)
MOVED = (
    "this optimizer moves the weights before it evaluates its closure, so the factors would be those of other "
    "gradients; call step() without a closure, or detach the LayerwiseLR adapter"
)
SEVERAL = (
    "this optimizer evaluates its closure more than once a step and moves the weights in between, so the factors of "
    "the second evaluation cannot act on the whole step; detach the LayerwiseLR adapter, or use a first-order optimizer"
)
READ = (
    "this optimizer reads rates from its parameter groups before it evaluates its closure, so the factors of the new "
    "gradients cannot act; use apply='update', or call step() without a closure"
)
SCALED = (
    "this optimizer evaluates its closure again after apply='gradient' has multiplied the gradients of the first "
    "evaluation; use apply='lr' or apply='update'"
)
UNEXPECTED = (
    "this optimizer evaluates its closure several times in this step and once in others, and the rule has already used "
    "the first gradients; detach the LayerwiseLR adapter, or use a rule without state"
)
WITHOUT = (
    "this optimizer took its step without evaluating its closure, so no factor could act; call step() without a "
    "closure, or detach the LayerwiseLR adapter"
)


class Member(Protocol):
    """Something attached to an optimizer."""

    enabled: bool

    @property
    def place(self) -> str:
        """Where the factors act."""
        ...

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers."""
        ...

    @property
    def factors(self) -> Factors | None:
        """The factors of the last step that was measured."""
        ...

    def prepare(self, optimizer: Any) -> None:
        """Check what has changed; it may raise, before any member has changed."""
        ...

    def measure(self, optimizer: Any, *, late: bool = False) -> None:
        """Compute this step's factors from the gradients.

        Args:
            optimizer: The optimizer.
            late: Whether no other code sees the gradients before the update, so that this may be done during it.
        """
        ...

    @property
    def takes_part(self) -> bool:
        """Whether it takes part in this step: it is enabled, or other processes may wait for it."""
        ...

    @property
    def acts(self) -> bool:
        """Whether this step's factors change anything."""
        ...

    def act(self, view: Any, *, private: bool, writes: Writes) -> list[Split]:
        """Let the factors act on the view; return how its groups were split.

        Args:
            view: The view.
            private: Whether only PyTorch's own `step` sees the view's groups.
            writes: Scales what the step writes.
        """
        ...

    def finish(self) -> None:
        """Act after the step."""
        ...

    def save(self) -> Any:
        """Return a copy of the rule's state."""
        ...

    def load(self, saved: Any) -> None:
        """Restore what `save` returned."""
        ...


class Observer(Protocol):
    """Something attached to an optimizer that watches its steps and changes nothing."""

    def begin(self, optimizer: Any) -> bool:
        """Begin a step; return whether `look` should be called for it."""
        ...

    def look(self, optimizer: Any, measured: Sequence[Member]) -> None:
        """Look at the unchanged gradients; `measured` are the members whose factors are about to act."""
        ...

    def end(self, optimizer: Any) -> None:
        """End a step; not called if it raised."""
        ...


class Call:
    """One call of `step`, from the hook before it to the hook after it.

    Args:
        begun: The observers whose `begin` was called.
        looking: Those of them whose `look` is to be called.
        view: What it runs on; None for the optimizer itself.
    """

    def __init__(self, begun: list[Observer], looking: list[Observer], view: Any = None) -> None:
        self.begun, self.looking, self.view = begun, looking, view
        self.given: dict[str, Any] = {}
        self.slots: dict[str, Any] = {}
        self.acted: Any = None
        self.active: list[Member] = []
        self.levels: list[list[Split]] = []
        self.writes: ScaledWrites | None = None
        # Where `step` has a closure the members measure when it was evaluated, or when the groups are read without.
        self.waits = False
        self.handed: list[WatchedGroup] = []
        self.read = self.quiet = self.read_early = False
        self.evaluated = 0
        self.versions: Sequence[int] = ()
        self.rules: list[tuple[Member, Any]] = []
        self.kept: Kept | None = None
        self.finished = self.private = False

    def clear(self) -> None:
        """Let the view keep nothing."""
        self.view.__dict__.clear()
        for name in self.slots:
            if hasattr(self.view, name):
                object.__delattr__(self.view, name)


def running_calls(calls: Sequence[Call], optimizer: Optimizer) -> dict[Call, bool]:
    """Return the calls that still run, in any thread, and whether `step` itself has returned.

    Args:
        calls: Those that no hook after the step has ended.
        optimizer: The optimizer, of which a further step begins now.
    """
    frames = list(_steps())
    on_optimizer = sum(_runs_on(frame, optimizer) for frame in frames) - 1
    running: dict[Call, bool] = {}
    for call in calls:
        if call.view is None:
            on_optimizer -= 1
            if on_optimizer >= 0:
                running[call] = False
        else:
            frame = next((frame for frame in frames if _runs_on(frame, call.view)), None)
            if frame is not None:
                running[call] = "out" in frame.f_locals
    return running


def _steps() -> Iterator[Any]:
    """Yield the frames of the steps that run now, in any thread."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is STEP:
                yield frame
            frame = frame.f_back


def _runs_on(frame: Any, optimizer: Any) -> bool:
    args = frame.f_locals.get("args")
    return isinstance(args, tuple) and len(cast("tuple[Any, ...]", args)) > 0 and args[0] is optimizer


# --- The hooks -------------------------------------------------------------------------------------------------------

# Weak references, because the optimizer's hooks keep this object; strong ones would keep a model that holds its
# optimizer alive. Keyed by id, because an optimizer may not be hashable.
_hooks_of: dict[int, tuple[weakref.ref[Optimizer], weakref.ref[OptimizerHooks]]] = {}
# On the view these methods stay bound to the optimizer, because reading the view's groups may trigger measurement.
_OWN_READERS = ("zero_grad", "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class OptimizerHooks:
    """Runs `step` on a shallow copy of the optimizer, its *view*, on which the members act.

    A pre-hook may replace the arguments of `step`, including its `self`. So the optimizer itself is never changed: an
    exception, a scheduler, another hook or `state_dict()` in the middle of a step sees it as usual.

    All members measure before any of them acts. So two adapters see the same gradients, and their factors multiply.
    Observers look between measuring and acting, and again after the step.

    `step` evaluates a closure itself, so it decides when, how often, with which arguments and in which gradient mode.
    The members measure and act as soon as the closure returns. PyTorch's own optimizers read their groups only after
    that. For other classes the view's groups report when they are read. Where that is before the closure, the members
    act at once, in case `step` never evaluates it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        # One view for all steps, since compiled steps guard on the object; a step within a closure gets another one.
        self._views: list[Any] = [object.__new__(type(optimizer))]
        self._calls: list[Call] = []
        # None of PyTorch's own optimizers writes into its groups (a test checks this), so the comparison is skipped.
        self._torch_own = getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer)
        self._has_slots = any(vars(kind).get("__slots__") for kind in type(optimizer).__mro__)
        # A step() that calls super().step() runs the hooks again. The view identifies the inner call.
        own_steps = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer]
        self._nests = len(own_steps) > 1
        # Until a step has evaluated its closure exactly once, weights and state are copied for a refusal.
        self._evaluates_once = self._torch_own
        self.members: list[Member] = []
        self.observers: list[Observer] = []
        self._deferred: tuple[int, Any] | None = None
        # Hooks traced into a compiled step would be silently wrong: the graph reads the groups of the optimizer.
        outside_graph = cast(Callable[[Any], Any], torch.compiler.disable)
        self._handles = (
            optimizer.register_step_pre_hook(outside_graph(self._before)),
            optimizer.register_step_post_hook(outside_graph(self._after)),
        )

    @classmethod
    def add(cls, optimizer: Optimizer, member: Member) -> None:
        """Attach a member, and the hooks with the first one."""
        cls._on(optimizer).members.append(member)

    @classmethod
    def watch(cls, optimizer: Optimizer, observer: Observer) -> None:
        """Attach an observer, and the hooks with the first one."""
        cls._on(optimizer).observers.append(observer)

    @classmethod
    def _on(cls, optimizer: Optimizer) -> OptimizerHooks:
        hooks = cls._of(optimizer)
        if hooks is None:
            hooks = cls(optimizer)
            key = id(optimizer)
            _hooks_of[key] = (weakref.ref(optimizer, lambda _: _hooks_of.pop(key, None)), weakref.ref(hooks))
        return hooks

    @classmethod
    def _of(cls, optimizer: Optimizer) -> OptimizerHooks | None:
        found = _hooks_of.get(id(optimizer))
        return None if found is None or found[0]() is not optimizer else found[1]()

    @classmethod
    def members_of(cls, optimizer: Optimizer) -> list[Member]:
        """Return the members attached to the optimizer."""
        hooks = cls._of(optimizer)
        return [] if hooks is None else list(hooks.members)

    @classmethod
    def observers_of(cls, optimizer: Optimizer) -> list[Observer]:
        """Return the observers attached to the optimizer."""
        hooks = cls._of(optimizer)
        return [] if hooks is None else list(hooks.observers)

    @classmethod
    def has_any(cls, optimizer: Optimizer) -> bool:
        """Tell whether a member or an observer is attached to the optimizer."""
        hooks = cls._of(optimizer)
        return hooks is not None and bool(hooks.members or hooks.observers)

    @classmethod
    def others(cls, optimizer: Optimizer, member: Member) -> list[Member]:
        """Return the other members attached to the optimizer."""
        return [other for other in cls.members_of(optimizer) if other is not member]

    @classmethod
    def remove(cls, optimizer: Optimizer, attached: Member | Observer) -> None:
        """Detach a member or an observer, and the hooks with the last one."""
        hooks = cls._of(optimizer)
        if hooks is None:  # other code has removed the optimizer's hooks
            return
        hooks.drop(attached)
        if not hooks.members and not hooks.observers:
            del _hooks_of[id(optimizer)]

    def drop(self, attached: Member | Observer) -> None:
        """Remove a member or an observer, and the hooks with the last one."""
        self.members = [member for member in self.members if member is not attached]
        self.observers = [observer for observer in self.observers if observer is not attached]
        for call in self._calls:
            call.active = [member for member in call.active if member is not attached]
            call.begun = [observer for observer in call.begun if observer is not attached]
            call.rules = [(member, saved) for member, saved in call.rules if member is not attached]
        if not self.members and not self.observers:
            for handle in self._handles:
                handle.remove()
            optimizer = self._optimizer()
            for call in self._calls:  # a running step continues on the optimizer itself
                if call.writes is not None:
                    call.writes.remove()
                if call.view is not None and optimizer is not None:
                    if call.waits:
                        self._carry_over(call)
                    call.view.__dict__ = optimizer.__dict__
            self._calls = []

    # --- Before a step ------------------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if optimizer is not self._optimizer():
            return None
        if self._deferred is not None or next(iter(optimizer._optimizer_step_post_hooks), -1) != self._handles[1].id:
            self._come_first(optimizer)
        if self._calls:
            self._settle_calls(optimizer)
        begun = list(self.observers)
        if self._calls:
            # Observers see a step within another one as part of the outer step, unless a closure takes it.
            seen = [observer for call in self._calls if not call.waits for observer in call.begun]
            begun = [observer for observer in begun if observer not in seen]
        looking = [observer for observer in begun if observer.begin(optimizer)]
        active = self._taking_part()
        if not (active or begun or self._calls):
            return None
        closure = None if len(args) == 1 and not kwargs else closure_of(args, kwargs)
        # PyTorch's own optimizers evaluate a closure once, first of all. Another hook may have changed the arguments.
        known = self._torch_own and len(optimizer._optimizer_step_pre_hooks) == 1
        call = Call(begun, looking)
        if closure is None:
            active = self._measure(call, active)
        elif not known:
            self.look(call, ())  # and again after the closure, if it is evaluated
        call.waits = closure is not None
        if closure is not None and not active and looking:
            args, kwargs = with_closure(args, kwargs, followed(closure, _observe_closure, self, call))
        if active or self._nests:
            call.view = view = self._free_view() if self._calls else self._views[0]
            view.__dict__.clear()
            call.given = dict(optimizer.__dict__)
            view.__dict__.update(call.given)
            if self._has_slots:
                call.slots = slots_of(optimizer)
                for name, value in call.slots.items():
                    object.__setattr__(view, name, value)
            call.acted = view.param_groups
        if active and closure is not None:
            if not known:
                self._prepare_for_any(call)
            call.versions = versions_of(optimizer)
            args, kwargs = with_closure(args, kwargs, followed(closure, _evaluate, self, call))
        elif active:
            self._act(call, active)
        self._calls.append(call)
        return args if call.view is None else (call.view, *args[1:]), kwargs

    def _settle_calls(self, optimizer: Optimizer) -> None:
        """Drop the calls that an exception has ended; raise if factors act on one that still runs.

        After an exception in `step` no post-hook is called, so the stack shows whether a call still runs.
        """
        running = running_calls(self._calls, optimizer)
        for call in self._calls:
            if call.view is not None and call not in running:
                call.clear()
                if call.writes is not None:
                    call.writes.remove()
        self._calls = list(running)
        for call, returned in running.items():
            if returned:
                self._end(call)  # a hook after `step` calls `step` again
        if any(call.active and not call.finished for call in self._calls):
            raise RuntimeError(REENTERED)

    def _free_view(self) -> Any:
        used = [call.view for call in self._calls]
        for view in self._views:
            if not any(view is one for one in used):
                return view
        self._views.append(object.__new__(type(self._optimizer())))
        return self._views[-1]

    def _measure(self, call: Call, members: list[Member], *, look: bool = True) -> list[Member]:
        """Let the members measure and the observers look; return the members whose factors change anything."""
        optimizer = self._optimizer()
        for member in members:
            member.prepare(optimizer)
        call.private = self._is_private()
        for member in members:
            member.measure(optimizer, late=call.private and len(members) == 1)
        if look and call.looking:
            self.look(call, [member for member in members if member.enabled])
        acting: list[Member] = []
        for member in members:
            if member.acts:
                acting.append(member)
        return acting

    def _is_private(self) -> bool:
        """Tell whether only PyTorch's own `step` sees the view's groups."""
        # Other pre-hooks get the view. Post-hooks are safe: by then its groups are the optimizer's again.
        optimizer = self._optimizer()
        return optimizer is not None and self._torch_own and len(optimizer._optimizer_step_pre_hooks) == 1

    def _come_first(self, optimizer: Optimizer) -> None:
        """Let our hook be the first after the step, so that all others see what the factors have made of it."""
        if self._deferred is not None:  # of a step in which another hook has raised
            last, hook = self._deferred
            if last in optimizer._optimizer_step_pre_hooks:
                optimizer._optimizer_step_pre_hooks[last] = hook
            self._deferred = None
        hooks, own = cast(Any, optimizer._optimizer_step_post_hooks), self._handles[1].id
        if own in hooks:
            hooks.move_to_end(own, last=False)

    def _begin_writes(self, mode: ScaledWrites, *, in_step: bool) -> None:
        """Scale writes from now on; before the step, once the other hooks have run, whose writes are their own."""
        hooks: Any = cast(Any, self._optimizer())._optimizer_step_pre_hooks
        last = next(reversed(hooks))
        if in_step or last == self._handles[0].id:
            mode.begin()
            return
        hook = hooks[last]

        def begin_after(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hooks[last], self._deferred = hook, None
            result = hook(optimizer, args, kwargs)
            mode.begin()
            return result

        hooks[last], self._deferred = begin_after, (last, hook)

    def look(self, call: Call, measured: Sequence[Member]) -> None:
        """Let the observers look."""
        for observer in call.looking:
            if observer in call.begun:  # a closure may have detached it
                observer.look(self._optimizer(), measured)

    def _act(self, call: Call, members: list[Member]) -> None:
        view, private = call.view, call.private and len(members) == 1
        call.active, call.writes = members, None

        def writes(factors: Iterable[tuple[Tensor, Factor]]) -> None:
            if call.writes is None:
                call.writes = ScaledWrites((p for group in view.param_groups for p in group["params"]), view.state)
            call.writes.scale(factors)

        levels: list[list[Split]] = []
        for member in members:
            levels.append(member.act(view, private=private, writes=writes))
        if call.writes is not None:
            self._begin_writes(call.writes, in_step=call.evaluated > 0 or call.read_early)
        if not private:
            for level in levels:
                for split in level:
                    split.remember()
            call.levels = levels
        call.acted = view.param_groups

    # --- A step with a closure ----------------------------------------------------------------------------------------

    def _prepare_for_any(self, call: Call) -> None:
        """Prepare for a step that reads groups or moves weights before its closure, or never evaluates it."""
        optimizer: Any = self._optimizer()
        if not self._evaluates_once:
            call.kept = Kept(optimizer)
            call.rules = [(member, member.save()) for member in self.members]
        if is_compiled() or "param_groups" not in optimizer.__dict__:
            return  # the compiler reads only plain lists, and a property may compute the groups

        def read() -> None:
            if call.waits:
                call.read_early = True
                call.rules = call.rules or [(member, member.save()) for member in self.members]
                self._act_anew(call, self._measure(call, self._taking_part()))
                self._hand_out(call)
            elif call.evaluated:
                call.read = True

        call.acted = call.view.param_groups = WatchedGroups(read)
        for name in _OWN_READERS:
            if hasattr(optimizer, name):
                call.given[name] = call.view.__dict__[name] = getattr(optimizer, name)

    def _hand_out(self, call: Call) -> None:
        """Replace the view's groups with ones that report what `step` reads before its closure or keeps after it."""

        def note() -> None:
            call.read = not call.quiet or call.read

        groups: list[dict[str, Any]] = [*call.view.param_groups]
        call.handed = [WatchedGroup(group, note, READ) for group in groups]
        by_id = {id(group): handed for group, handed in zip(groups, call.handed, strict=True)}
        parts: set[int] = set()
        for level in call.levels:
            for split in level:
                parts.update(map(id, split.parts))
                split.parts = [by_id.get(id(part), part) for part in split.parts]
        whole = [Split(group, [by_id[id(group)]], [{}]) for group in groups if id(group) not in parts]
        call.quiet = True
        for split in whole:
            split.remember()
        call.quiet = False
        call.levels = [*call.levels, whole]
        call.view.param_groups[:] = call.handed

    def _taking_part(self) -> list[Member]:
        found: list[Member] = []
        for member in self.members:
            if member.takes_part:
                found.append(member)
        return found

    def evaluate(self, call: Call, closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Evaluate the closure of a step; then the members measure and act."""
        optimizer: Any = self._optimizer()
        moved, again = versions_of(optimizer) != call.versions, call.evaluated > 0
        if call.active:
            self._check_again(call, call.active, moved, again)
        if not call.waits:  # the new gradients replace those measured before
            if not call.rules and any(member.save() for member in self.members):
                self._refuse(call, UNEXPECTED)
            for member, saved in call.rules:
                member.load(saved)
        if call.handed:  # carry over what `step` has written so far
            call.quiet = True
            for level in reversed(call.levels):
                write_back(level, type(optimizer).__name__)
            call.quiet = False
        if call.writes is not None:
            call.writes.remove()
        loss = closure(*args, **kwargs)
        call.evaluated += 1
        if not self.members and not self.observers:  # the closure has detached the last one
            return loss
        call.versions = versions_of(optimizer)
        changed = {name: x for name, x in optimizer.__dict__.items() if x is not call.given.get(name, self)}
        call.given.update(changed)
        call.view.__dict__.update({name: x for name, x in changed.items() if name != "param_groups"})
        acting = self._measure(call, self._taking_part())
        if acting:
            self._check_again(call, acting, moved, again)
        self._act_anew(call, acting)
        return loss

    def _check_again(self, call: Call, acting: list[Member], moved: bool, again: bool) -> None:
        """Raise if the factors of this evaluation could not act on the whole step."""
        places = {member.place for member in acting}
        if moved:
            self._refuse(call, SEVERAL if again else MOVED)
        if call.read and places != {"update"}:
            self._refuse(call, READ)
        if call.active and "gradient" in places:
            self._refuse(call, SCALED)

    def _refuse(self, call: Call, message: str) -> None:
        if call.kept is not None:
            call.kept.put_back(self._optimizer())
            for member, saved in call.rules:
                member.load(saved)
        raise RuntimeError(message)

    def _act_anew(self, call: Call, acting: list[Member]) -> None:
        view, optimizer = call.view, cast(Any, self._optimizer())
        watched, call.waits, levels, call.levels = view.param_groups, False, call.levels, []
        if "param_groups" in optimizer.__dict__:
            view.param_groups = optimizer.param_groups
        self._act(call, acting)
        if not isinstance(watched, WatchedGroups):
            return
        whole = [split.source for level in levels for split in level]
        if call.handed and same_objects(whole, view.param_groups):  # no group was or is divided: keep them
            for group, handed in zip(whole, call.handed, strict=True):
                handed.refresh(group)
            call.levels, view.param_groups = levels, call.handed
        else:
            for group in call.handed:
                group.end()
            call.handed = []
        watched[:] = view.param_groups
        call.acted = view.param_groups = watched

    # --- After a step -------------------------------------------------------------------------------------------------

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is not self._optimizer():
            return
        ran_on = None if args[0] is optimizer else args[0]
        call = self._calls[-1] if self._calls else None
        if call is not None and call.view is not ran_on:
            call = next((call for call in reversed(self._calls) if call.view is ran_on), None)
        if call is not None:
            self._calls.remove(call)
            self._end(call)
        elif any(ran_on is view for view in self._views):  # a step within this one took this call for a failed one
            raise RuntimeError(REENTERED)

    def _end(self, call: Call) -> None:
        if call.finished:
            return
        call.finished = True
        optimizer: Any = self._optimizer()
        if call.view is not None:
            self._finish(call)
        for observer in call.begun:
            observer.end(optimizer)

    def _finish(self, call: Call) -> None:
        """Let the members act after the step, and carry over to the optimizer what `step` wrote into the view."""
        optimizer: Any = self._optimizer()
        view = call.view
        without = call.waits and call.versions and versions_of(optimizer) != call.versions
        if without and self._measure(call, self._taking_part(), look=False):
            self._refuse(call, WITHOUT)
        self._evaluates_once = self._evaluates_once or call.evaluated == 1
        try:
            if call.writes is not None:
                call.writes.end()
            for member in reversed(call.active):
                member.finish()
            for level in reversed(call.levels):
                write_back(level, type(optimizer).__name__)
        finally:
            self._carry_over(call)
            replaced, divided = view.param_groups is not call.acted, any(call.levels)
            if replaced and not divided:
                optimizer.param_groups = view.param_groups
            call.clear()
            # Other post-hooks get the view. It keeps only what they read, so that it keeps nothing else alive.
            for name in ("defaults", "state", "param_groups"):
                if name in optimizer.__dict__:
                    view.__dict__[name] = optimizer.__dict__[name]
        if replaced and divided:
            raise RuntimeError(
                f"{type(optimizer).__name__} replaced its parameter groups in this step, which used per-layer groups, "
                "so the new ones are lost; attach with apply='update', which leaves the groups whole"
            )

    def _carry_over(self, call: Call) -> None:
        """Set on the optimizer the attributes that `step` has set on the view."""
        optimizer: Any = self._optimizer()
        for name, value in call.view.__dict__.items():
            if value is not call.given.get(name) and name not in ("param_groups", "grad_scale"):
                optimizer.__dict__[name] = value
        for name, value in slots_of(call.view).items() if self._has_slots else ():
            if value is not call.slots.get(name):
                object.__setattr__(optimizer, name, value)


def _observe_closure(hooks: OptimizerHooks, call: Call, closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Evaluate the closure of a step that has observers only; they look after the first evaluation."""
    loss = closure(*args, **kwargs)
    if call.waits:
        call.waits = False
        hooks.look(call, ())
    return loss


def _evaluate(hooks: OptimizerHooks, call: Call, closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return hooks.evaluate(call, closure, args, kwargs)
