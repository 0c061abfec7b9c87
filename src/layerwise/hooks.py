"""The one pair of hooks on an optimizer: the view that `step` runs on, and what `step` wrote there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch.optim import Optimizer

from .closures import closure_of, evaluate_closure, with_closure
from .factors import Factors
from .layers import Layer
from .splits import Split, write_back
from .tensors import slots_of

# Held weakly, since the optimizer's own hooks keep it: else a model that holds its optimizer would never be freed.
# By id, since an optimizer may have no hash.
_hooks_of: dict[int, tuple[weakref.ref[Optimizer], weakref.ref[OptimizerHooks]]] = {}


class Member(Protocol):
    """Something attached to an optimizer."""

    enabled: bool

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers."""
        ...

    @property
    def factors(self) -> Factors | None:
        """The factors of the last step that was measured."""
        ...

    def prepare(self, optimizer: Any) -> None:
        """Look at what has changed; may raise, and has changed nothing of any member then."""
        ...

    def measure(self, optimizer: Any, *, late: bool = False) -> None:
        """Compute this step's factors from the gradients.

        Args:
            optimizer: The optimizer.
            late: Whether nobody sees the gradients between here and the update, so that this may be done during it.
        """
        ...

    @property
    def takes_part(self) -> bool:
        """Whether it is to be asked at this step: it is enabled, or other processes may wait for it."""
        ...

    @property
    def acts(self) -> bool:
        """Whether this step's factors change anything."""
        ...

    def act(self, view: Any, *, private: bool) -> list[Split]:
        """Let the factors act on the view; return how its groups were split.

        Args:
            view: The view.
            private: Whether nobody but PyTorch's own `step` sees the view's groups.
        """
        ...

    def finish(self) -> None:
        """Act after the step."""
        ...


class Observer(Protocol):
    """Something attached to an optimizer that watches its steps and changes nothing."""

    def begin(self, optimizer: Any) -> bool:
        """Take note that a step begins; return whether to be shown it."""
        ...

    def look(self, optimizer: Any, measured: Sequence[Member]) -> None:
        """Look at the gradients as they arrived; `measured` are the members whose factors are about to act."""
        ...

    def end(self, optimizer: Any) -> None:
        """Take note that the step has been taken; not called if it raised."""
        ...


class OptimizerHooks:
    """Runs `step` on a shallow copy of the optimizer, its *view*, on which the members act.

    A pre-hook may replace the arguments of `step`, its `self` among them. The optimizer itself is therefore never
    changed: an exception, a scheduler, another hook or `state_dict()` in the middle of a step meets it as it always is.

    All members measure before any of them acts, so that two adapters both see the gradients as they arrived and their
    factors multiply. Observers look between the two, and again after the step. For them alone the arguments of `step`
    stay as they are, but for a closure that they look behind: it is called when and as often as `step` calls it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        # One object for all steps: compiled steps are guarded on it.
        self._view: Any = object.__new__(type(optimizer))
        self._given: dict[str, Any] = {}
        self._slots: dict[str, Any] = {}
        self._acted: Any = None
        self._active: list[Member] = []
        self._levels: list[list[Split]] = []
        # None of torch's own optimizers writes into its groups (a test holds them to it); looking for it costs.
        self._torch_own = getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer)
        # A step() that calls super().step() runs the hooks once more; the view is how the inner step is told apart.
        own_steps = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer]
        self._nests = len(own_steps) > 1
        self._begun: list[Observer] = []
        self.members: list[Member] = []
        self.observers: list[Observer] = []
        # Traced into a compiled step the hooks would be silently wrong: the graph reads the groups of the optimizer.
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
        if hooks is None:  # another program has thrown the optimizer's hooks away
            return
        hooks.drop(attached)
        if not hooks.members and not hooks.observers:
            del _hooks_of[id(optimizer)]

    def drop(self, attached: Member | Observer) -> None:
        """Forget a member or an observer, and take the hooks off with the last one."""
        self.members = [member for member in self.members if member is not attached]
        self.observers = [observer for observer in self.observers if observer is not attached]
        self._active = [member for member in self._active if member is not attached]
        self._begun = [observer for observer in self._begun if observer is not attached]
        if not self.members and not self.observers:
            for handle in self._handles:
                handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if optimizer is not self._optimizer():
            return None
        if self._given:  # an exception in the last step() left no post-hook to clear up
            self._clear()
        self._begun = list(self.observers)
        looking = [observer for observer in self._begun if observer.begin(optimizer)]
        active = [member for member in self.members if member.takes_part]
        # Other hooks are handed the view, but for post-hooks after ours, when its groups are the optimizer's again.
        private = (
            self._torch_own
            and len(optimizer._optimizer_step_pre_hooks) == 1
            and next(iter(optimizer._optimizer_step_post_hooks), None) == self._handles[1].id
        )
        if active:
            if kwargs or len(args) > 1:
                args, kwargs = evaluate_closure(args, kwargs)
                active = [member for member in self.members if member.takes_part]  # a closure may pause or detach
            for member in active:
                member.prepare(optimizer)
            for member in active:
                member.measure(optimizer, late=private and len(active) == 1)
            self._look(looking, [member for member in active if member.enabled])
            active = [member for member in active if member.acts]
        elif looking:
            args, kwargs = self._look_behind_closure(looking, args, kwargs)
        elif not self._begun:
            return None
        if not active and not self._nests:
            return args, kwargs
        view = self._view
        self._given = given = dict(optimizer.__dict__)
        view.__dict__.update(given)
        self._slots = slots_of(optimizer)
        for name, value in self._slots.items():
            object.__setattr__(view, name, value)
        levels = [member.act(view, private=private and len(active) == 1) for member in active]
        if not private:
            for level in levels:
                for split in level:
                    split.remember()
            self._levels = levels
        self._active = active
        self._acted = view.param_groups
        return (view, *args[1:]), kwargs

    def _look(self, looking: Sequence[Observer], measured: Sequence[Member]) -> None:
        for observer in looking:
            if observer in self._begun:  # a closure may detach
                observer.look(self._optimizer(), measured)

    def _look_behind_closure(
        self, looking: list[Observer], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let observers look as soon as the gradients are there: now, or when `step` has called its closure once."""
        closure = closure_of(args, kwargs)
        if closure is None:
            self._look(looking, ())
            return args, kwargs
        waiting = list(looking)
        look = cast(Callable[..., None], torch.compiler.disable(self._look))

        def looked_behind() -> Any:
            loss = closure()
            look(waiting, ())
            waiting.clear()
            return loss

        return with_closure(args, kwargs, looked_behind)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is not self._optimizer():
            return
        if args[0] is self._view:
            self._finish(optimizer)
        begun, self._begun = self._begun, []
        for observer in begun:
            observer.end(optimizer)

    def _finish(self, optimizer: Optimizer) -> None:
        """Let the members act after the step, and hand the optimizer what `step` wrote into the view."""
        view = self._view
        for member in reversed(self._active):
            member.finish()
        try:
            for level in reversed(self._levels):
                write_back(level, type(optimizer).__name__)
        finally:
            given, written = self._given, view.__dict__
            for name, value in written.items():
                if value is not given.get(name) and name not in ("param_groups", "grad_scale"):
                    optimizer.__dict__[name] = value
            for name, value in slots_of(view).items():
                if value is not self._slots.get(name):
                    object.__setattr__(optimizer, name, value)
            replaced, divided = view.param_groups is not self._acted, any(self._levels)
            if replaced and not divided:
                optimizer.param_groups = view.param_groups
            self._clear()
            # Other post-hooks are handed the view; without hooks of its own it keeps nothing alive but what they read.
            for name in ("defaults", "state", "param_groups"):
                if name in optimizer.__dict__:
                    written[name] = optimizer.__dict__[name]
        if replaced and divided:
            raise RuntimeError(
                f"{type(optimizer).__name__} has replaced its parameter groups in this step, which was taken with "
                "per-layer groups, so the new ones are lost; attach with apply='update', which leaves the groups whole"
            )

    def _clear(self) -> None:
        self._view.__dict__.clear()
        for name in self._slots:
            if hasattr(self._view, name):
                object.__delattr__(self._view, name)
        self._given, self._slots, self._active, self._levels, self._acted = {}, {}, [], [], None
