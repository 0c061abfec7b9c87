"""One call of an optimizer's `step`: who acts on it, who watches it, what was done, and whether it still runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

from torch.optim import Optimizer

from ._writes import STEP
from .closures import Kept, WatchedGroup
from .factors import Factors
from .layers import Layer
from .splits import Split

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

    def act(self, view: Any, *, private: bool) -> list[Split]:
        """Let the factors act on the view; return how its groups were split.

        Args:
            view: The view.
            private: Whether only PyTorch's own `step` sees the view's groups.
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
        # Where `step` has a closure the members measure when it was evaluated, or when the groups are read without.
        self.waits = False
        self.handed: list[WatchedGroup] = []
        self.read = self.quiet = False
        self.evaluated = 0
        self.versions: Sequence[int] = ()
        self.rules: list[tuple[Member, Any]] = []
        self.kept: Kept | None = None
        self.finished = False

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
