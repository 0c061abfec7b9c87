"""The pair of hooks on an optimizer: `step` runs on a copy, and what it writes is carried over."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    Where several processes train, only its caller distinguishes it from a step of a warm-up that starts at 0. A process
    may hold zeros of a gradient that is not zero elsewhere, so its own values decide nothing for the others. Nor can
    the processes ask each other: a checkpoint may take the step in one process alone, where that process has no state.
    The caller is the same in all processes that take part. One process reads values, where all rates are zero.
    """
    if several_processes():
        return _called_by_a_checkpoint()
    if any(map(_moves, groups)):
        return False
    return all(_is_zero(p.grad) for group in groups for p in group["params"] if p.requires_grad)


def _is_zero(gradient: Tensor | None) -> bool:
    """Return whether a gradient exists and all its values are zero; a sparse one is not read."""
    if gradient is None or gradient.layout is not torch.strided or not has_values(gradient):
        return False
    return not bool(local(gradient).detach().count_nonzero())


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


def followed(closure: Any, evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a closure that calls `evaluate(closure, args, kwargs)` outside of compiled graphs."""
    return update_wrapper(partial(_outside_graph(), evaluate, closure), closure)


@cache
def _outside_graph() -> Callable[..., Any]:
    """Return `_followed` outside of compiled graphs, once, because `torch.compiler.disable` is slow."""
    return cast(Callable[..., Any], torch.compiler.disable(_followed))


def _followed(evaluate: Callable[..., Any], closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return evaluate(closure, args, kwargs)


def _watched(kind: Any, *readers: str) -> Any:
    """Return a subclass whose attribute `note` is called with the arguments of each of these methods before it."""

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *args: Any) -> Any:
            self.note(*args)
            return method(self, *args)

        return noted

    def reduced(self: Any) -> Any:  # a copy is an ordinary list or dictionary
        return kind, (kind(self),)

    methods = {name: noting(getattr(kind, name)) for name in readers}
    return type(f"Watched{kind.__name__}", (kind,), {**methods, "__reduce__": reduced})


WatchedGroups = _watched(list, "__iter__", "__reversed__", "__len__", "__getitem__", "__add__")
WatchedGroup = _watched(dict, "__iter__", "__getitem__", "get", "items", "values")


def _copied(value: Any) -> Any:
    """Return a copy of a part of an optimizer's state."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [_copied(one) for one in cast(list[Any], value)]
    return value


def versions_of(optimizer: Any) -> Sequence[int]:
    """Return the version counters of the parameters, which change with each write in place."""
    return [p._version for group in optimizer.param_groups for p in group["params"]]


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

    def measure(self, optimizer: Any) -> bool:
        """Compute this step's factors from the gradients; return whether they change anything."""
        ...

    @property
    def comes_first(self) -> bool:
        """Whether it acts before others."""
        ...

    @property
    def takes_part(self) -> bool:
        """Whether it takes part in this step: it is enabled, or other processes may wait for it."""
        ...

    def act(self, view: Any, *, private: bool, writes: Writes) -> list[Split]:
        """Let the factors act on the view, or by `writes` on what the step writes; return how its groups were split.

        `private` says that only PyTorch's own `step` sees the view's groups.
        """
        ...

    def finish(self) -> None:
        """Act after the step."""

    def save(self) -> Any:
        """Return a copy of the rule's state."""
        ...

    def load(self, saved: Any) -> None:
        """Restore what `save` returned."""


class Observer(Protocol):
    """Something attached to an optimizer that watches its steps and changes nothing."""

    def begin(self, optimizer: Any) -> bool:
        """Begin a step; return whether `look` should be called for it."""
        ...

    def look(self, optimizer: Any, measured: Sequence[Member]) -> None:
        """Look at the unchanged gradients; `measured` are the members whose factors are about to act."""

    def end(self, optimizer: Any) -> None:
        """End a step; not called if it raised."""


class Call:
    """One call of `step`, from the hook before it to the hook after it."""

    waits = False
    """Whether a closure is to be evaluated before the members act."""
    versions: Sequence[int] = ()
    """Of the parameters, where members wait for a closure: when it was last evaluated, or when `step` was called."""

    def __init__(self, begun: list[Observer], looking: list[Observer], *, private: bool) -> None:
        self.begun = begun  # the observers whose `begin` was called
        self.looking = looking  # those of them whose `look` is to be called
        # Whether only PyTorch's own `step` sees the view's groups, which evaluates a closure once, first of all.
        self.private = private
        self.view: Any = None  # what `step` runs on; None for the optimizer itself
        self.given: dict[str, Any] = {}  # the attributes that the view had when `step` began
        self.slots: dict[str, Any] = {}
        self.acted: Any = None  # the view's groups when the members have acted
        self.active: list[Member] = []
        self.levels: list[list[Split]] = []
        self.writes: ScaledWrites | None = None
        self.finished = False

    def clear(self) -> None:
        """Let the view keep nothing."""
        self.view.__dict__.clear()
        for name in self.slots:
            if hasattr(self.view, name):
                object.__delattr__(self.view, name)


class ClosureCall(Call):
    """A call of `step` with a closure, after which the members measure and act.

    PyTorch's own optimizers read their groups only after the closure. Others may read groups or move weights before it,
    evaluate it several times, or never. So the view's groups report when they are read. If that is before the closure,
    the members act at once, in case it is never evaluated.
    """

    waits = True

    def begin(self, hooks: OptimizerHooks, optimizer: Any) -> None:
        """Prepare for the members; without them only observers look."""
        self.hooks, self.versions, self.evaluated = hooks, versions_of(optimizer), 0
        self.watched: Any = None  # the view's groups, where they report that they are read,
        self.handed: list[Any] = []  # and those in it that `step` may have kept since before the closure
        self.read = False  # whether `step` has read from them what may differ between layers
        self.rules: list[tuple[Member, Any]] = []
        self.kept: tuple[list[tuple[Tensor, Tensor]], dict[Any, Any]] | None = None
        if self.private:
            return
        if not hooks.evaluates_once:
            parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
            weights = [(p, local(p).detach().clone()) for p in parameters]
            self.kept = weights, {key: _copied(value) for key, value in optimizer.state.items()}
            self._save_rules()
        if is_compiled() or "param_groups" not in optimizer.__dict__:
            return  # the compiler reads only plain lists, and a property may compute the groups
        self.watched = self.acted = self.view.param_groups = WatchedGroups()
        self.watched.note = self._note_groups
        for name in _OWN_READERS:
            if hasattr(optimizer, name):
                self.given[name] = self.view.__dict__[name] = getattr(optimizer, name)

    def _save_rules(self) -> None:
        self.rules = self.rules or [(member, member.save()) for member in self.hooks.members]

    def _load_rules(self) -> None:
        for member, saved in self.rules:
            if member in self.hooks.members:  # the closure may have detached it
                member.load(saved)

    def _note_groups(self, *_: Any) -> None:
        """Act before the list of groups is read, if the closure is not evaluated yet."""
        if not self.waits:
            self.read = self.read or self.evaluated > 0
            return
        self._save_rules()
        self._act_again(self.hooks.measure(self, self.hooks.taking_part()))
        self.handed = [WatchedGroup(group) for group in self.view.param_groups]
        for handed in self.handed:
            handed.note = self._note_value
        whole = [Split(group, [own], [{}]) for group, own in zip(self.view.param_groups, self.handed, strict=True)]
        for split in whole:
            split.remember()
        self.read = False
        self.levels = [*self.levels, whole]
        self.watched[:] = self.handed

    def _note_value(self, name: str | None = None, *_: Any) -> None:
        self.read = self.read or name in (None, "lr", "weight_decay", "dampening")

    def evaluate(self, closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Evaluate the closure; then the members measure and act."""
        hooks, optimizer = self.hooks, self.hooks.optimizer
        moved, again = versions_of(optimizer) != self.versions, self.evaluated > 0
        self._check(self.active, moved, again)
        if not self.waits:  # the new gradients replace those measured before
            if not self.rules and any(member.save() for member in hooks.members):
                self._refuse(UNEXPECTED)
            self._load_rules()
        if self.handed:  # carry over what `step` has written so far
            read = self.read
            for level in reversed(self.levels):
                write_back(level, type(optimizer).__name__)
            self.read = read
        if self.writes is not None:
            self.writes.remove()
        loss = closure(*args, **kwargs)
        self.evaluated += 1
        if not hooks.members and not hooks.observers:  # the closure has detached the last one
            return loss
        self.versions = versions_of(optimizer)
        changed = {name: x for name, x in optimizer.__dict__.items() if x is not self.given.get(name, self)}
        self.given.update(changed)
        self.view.__dict__.update({name: x for name, x in changed.items() if name != "param_groups"})
        acting = hooks.measure(self, hooks.taking_part())
        self._check(acting, moved, again)
        self._act_again(acting)
        return loss

    def _check(self, acting: list[Member], moved: bool, again: bool) -> None:
        """Raise if the factors of this evaluation cannot act on the whole step."""
        places = {member.place for member in acting}
        if places and moved:
            self._refuse(SEVERAL if again else MOVED)
        if places - {"update"} and self.read:
            self._refuse(READ)
        if "gradient" in places and self.active:
            self._refuse(SCALED)

    def _act_again(self, acting: list[Member]) -> None:
        """Let the members act on the optimizer's groups, in place of those that the view has had so far."""
        view, optimizer = self.view, self.hooks.optimizer
        self.waits, levels, self.levels = False, self.levels, []
        if "param_groups" in optimizer.__dict__:
            view.param_groups = optimizer.param_groups
        self.hooks.act(self, acting)
        if self.watched is None:
            return
        if self.handed and same_objects([split.source for split in levels[-1]], view.param_groups):
            for group, handed in zip(view.param_groups, self.handed, strict=True):  # none was or is divided: keep them
                handed.update(group)
            self.levels, view.param_groups = levels, self.handed
        else:
            for handed in self.handed:
                handed.note = _refuse_stale
            self.handed = []
        self.watched[:] = view.param_groups
        self.acted = view.param_groups = self.watched

    def end(self) -> None:
        """Raise if the step has moved weights without factors, because it has neither evaluated nor read anything."""
        hooks = self.hooks
        without = self.waits and versions_of(hooks.optimizer) != self.versions
        if without and hooks.measure(self, hooks.taking_part(), look=False):
            self._refuse(WITHOUT)
        hooks.evaluates_once = hooks.evaluates_once or self.evaluated == 1

    @torch.no_grad()
    def _refuse(self, message: str) -> None:
        """Raise, and restore weights and state if they were kept."""
        if self.kept is not None:
            weights, state = self.kept
            for p, value in weights:
                local(p).copy_(value)
            self.hooks.optimizer.state.clear()
            self.hooks.optimizer.state.update(state)
            self._load_rules()
        raise RuntimeError(message)


def _refuse_stale(*_: Any) -> None:
    raise RuntimeError(READ)


def running_steps() -> list[tuple[Any, bool]]:
    """Return what each step that runs now, in any thread, is called on, and whether `step` itself has returned."""
    found: list[tuple[Any, bool]] = []
    for frame in sys._current_frames().values():
        while frame is not None:
            args: Any = frame.f_locals.get("args") if frame.f_code is STEP else None
            if args:
                found.append((args[0], "out" in frame.f_locals))
            frame = frame.f_back
    return found


# --- The hooks -------------------------------------------------------------------------------------------------------

# Weak, because the optimizer's hooks keep these objects. By id, because an optimizer may not be hashable.
_hooks_of: weakref.WeakValueDictionary[int, OptimizerHooks] = weakref.WeakValueDictionary()
# On the view these methods stay bound to the optimizer, because reading the view's groups may trigger measurement.
_OWN_READERS = ("zero_grad", "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class OptimizerHooks:
    """Runs `step` on a shallow copy of the optimizer, its *view*, on which the members act.

    A pre-hook may replace the arguments of `step`, including its `self`. So the optimizer itself is never changed: an
    exception, a scheduler, another hook or `state_dict()` in the middle of a step sees it as usual.

    All members measure before any of them acts. So two adapters see the same gradients, and their factors multiply.
    Observers look between measuring and acting, and again after the step.

    `step` evaluates a closure itself, so it decides when, how often, with which arguments and in which gradient mode.
    The members measure and act as soon as the closure returns.
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
        self.evaluates_once = self._torch_own
        self.members: list[Member] = []
        self.observers: list[Observer] = []
        self._deferred: tuple[int, Any] | None = None
        # Hooks traced into a compiled step would be silently wrong: the graph reads the groups of the optimizer.
        outside_graph = cast(Callable[[Any], Any], torch.compiler.disable)
        self._handles = (
            optimizer.register_step_pre_hook(outside_graph(self._before)),
            optimizer.register_step_post_hook(outside_graph(self._after)),
        )

    @property
    def optimizer(self) -> Any:
        """The optimizer."""
        return self._optimizer()

    @classmethod
    def add(cls, optimizer: Optimizer, member: Member) -> None:
        """Attach a member, and the hooks with the first one."""
        members = cls._on(optimizer).members
        members.insert(0 if member.comes_first else len(members), member)

    @classmethod
    def watch(cls, optimizer: Optimizer, observer: Observer) -> None:
        """Attach an observer, and the hooks with the first one."""
        cls._on(optimizer).observers.append(observer)

    @classmethod
    def _on(cls, optimizer: Optimizer) -> OptimizerHooks:
        hooks = cls._of(optimizer)
        if hooks is None:
            hooks = _hooks_of[id(optimizer)] = cls(optimizer)
        return hooks

    @classmethod
    def _of(cls, optimizer: Optimizer) -> OptimizerHooks | None:
        hooks = _hooks_of.get(id(optimizer))
        return hooks if hooks is not None and hooks.optimizer is optimizer else None

    @classmethod
    def members_of(cls, optimizer: Optimizer) -> list[Member]:
        """Return the members attached to the optimizer."""
        hooks = cls._of(optimizer)
        return [] if hooks is None else list(hooks.members)

    @classmethod
    def attached_to(cls, optimizer: Optimizer) -> list[Member | Observer]:
        """Return the members and observers attached to the optimizer."""
        hooks = cls._of(optimizer)
        return [] if hooks is None else [*hooks.members, *hooks.observers]

    @classmethod
    def remove(cls, optimizer: Optimizer, attached: Member | Observer) -> None:
        """Detach a member or an observer, and the hooks with the last one."""
        hooks = cls._of(optimizer)
        if hooks is not None:  # unless other code has removed the optimizer's hooks
            hooks.drop(optimizer, attached)

    def drop(self, optimizer: Optimizer, attached: Member | Observer) -> None:
        """Detach a member or an observer, and these hooks with the last one."""
        self.members = [member for member in self.members if member is not attached]
        self.observers = [observer for observer in self.observers if observer is not attached]
        for call in self._calls:
            call.active = [member for member in call.active if member is not attached]
            call.begun = [observer for observer in call.begun if observer is not attached]
        if self.members or self.observers:
            return
        for handle in self._handles:
            handle.remove()
        for call in self._calls:  # a running step continues on the optimizer itself
            if call.writes is not None:
                call.writes.remove()
            if call.view is not None:
                if call.waits:
                    self._carry_over(call)
                call.view.__dict__ = optimizer.__dict__
        self._calls = []
        del _hooks_of[id(optimizer)]

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
        looking = [observer for observer in begun if observer.begin(optimizer)] if begun else []
        active = self.taking_part()
        if not (active or begun or self._calls):
            return None
        closure = None if len(args) == 1 and not kwargs else closure_of(args, kwargs)
        # Another hook gets the view, whose groups are the optimizer's again after the step, and may change arguments.
        private = self._torch_own and len(optimizer._optimizer_step_pre_hooks) == 1
        kind = Call if closure is None else ClosureCall
        call = kind(begun, looking, private=private)
        if closure is None:
            active = self.measure(call, active)
        elif not private:
            self._look(call, ())  # and again after the closure, if it is evaluated
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
        if active and isinstance(call, ClosureCall):
            call.begin(self, optimizer)
            args, kwargs = with_closure(args, kwargs, followed(closure, call.evaluate))
        elif active:
            self.act(call, active)
        elif closure is not None and looking:
            args, kwargs = with_closure(args, kwargs, followed(closure, partial(self._observe, call)))
        self._calls.append(call)
        return args if call.view is None else (call.view, *args[1:]), kwargs

    def _settle_calls(self, optimizer: Optimizer) -> None:
        """Drop the calls that an exception has ended; raise if factors act on one that still runs.

        After an exception in `step` no post-hook is called, so the stack shows whether a call still runs.
        """
        steps = running_steps()
        on_optimizer = sum(ran_on is optimizer for ran_on, _ in steps) - 1  # a further one begins now
        running: dict[Call, bool] = {}
        for call in self._calls:
            returned = [returned for ran_on, returned in steps if ran_on is call.view]
            if call.view is None:
                on_optimizer -= 1
                if on_optimizer >= 0:
                    running[call] = False
            elif returned:
                running[call] = returned[0]
            else:
                call.clear()
                if call.writes is not None:
                    call.writes.remove()
        self._calls = list(running)
        for call, has_returned in running.items():
            if has_returned:  # a hook after `step` calls `step` again
                self._end(call)
        if any(call.active and not call.finished for call in self._calls):
            raise RuntimeError(REENTERED)

    def _free_view(self) -> Any:
        used = [call.view for call in self._calls]
        for view in self._views:
            if not any(view is one for one in used):
                return view
        self._views.append(object.__new__(type(self._optimizer())))
        return self._views[-1]

    def taking_part(self) -> list[Member]:
        """Return the members with something to do in a step."""
        found: list[Member] = []
        for member in self.members:
            if member.enabled or member.takes_part:
                found.append(member)
        return found

    def measure(self, call: Call, members: list[Member], *, look: bool = True) -> list[Member]:
        """Let the members measure and the observers look; return the members whose factors change anything."""
        optimizer = self._optimizer()
        for member in members:
            member.prepare(optimizer)
        acting: list[Member] = []
        for member in members:
            if member.measure(optimizer):
                acting.append(member)
        if look and call.looking:
            self._look(call, [member for member in members if member.enabled])
        return acting

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
        hooks: Any = self.optimizer._optimizer_step_pre_hooks
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

    def _look(self, call: Call, measured: Sequence[Member]) -> None:
        for observer in call.looking:
            if observer in call.begun:  # a closure may have detached it
                observer.look(self._optimizer(), measured)

    def _observe(self, call: Call, closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Evaluate the closure of a step without members; observers look after the first evaluation."""
        loss = closure(*args, **kwargs)
        if call.waits:
            call.waits = False
            self._look(call, ())
        return loss

    def act(self, call: Call, members: list[Member]) -> None:
        """Let the members act on the view."""
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
            self._begin_writes(call.writes, in_step=isinstance(call, ClosureCall))
        if not private:
            for level in levels:
                for split in level:
                    split.remember()
            call.levels = levels
        call.acted = view.param_groups

    # --- After a step -------------------------------------------------------------------------------------------------

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is not self._optimizer():
            return
        ran_on = None if args[0] is optimizer else args[0]
        for call in reversed(self._calls):
            if call.view is ran_on:
                self._calls.remove(call)
                self._end(call)
                return
        if any(ran_on is view for view in self._views):  # a step within this one took this call for a failed one
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
        if call.versions and isinstance(call, ClosureCall):
            call.end()
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
