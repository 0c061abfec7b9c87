"""Per-layer learning rates for any PyTorch optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import rules, sinks
    from .adapter import LayerwiseLR, attach
    from .backward import step_in_backward
    from .checkpoint import load_checkpoint
    from .diagnosis import diagnose
    from .monitor import Monitor
    from .rules.permanent_groups import param_groups

__version__ = "0.1.0"

__all__ = [
    "LayerwiseLR",
    "Monitor",
    "attach",
    "diagnose",
    "load_checkpoint",
    "param_groups",
    "rules",
    "sinks",
    "step_in_backward",
]

_MODULES = {
    "LayerwiseLR": "adapter",
    "Monitor": "monitor",
    "attach": "adapter",
    "diagnose": "diagnosis",
    "load_checkpoint": "checkpoint",
    "param_groups": "rules.permanent_groups",
    "rules": "rules",
    "sinks": "sinks",
    "step_in_backward": "backward",
}


if not TYPE_CHECKING:  # so that type checkers report unknown names

    def __getattr__(name: str) -> Any:
        """Import the library when something of it is first asked for.

        It needs PyTorch, whose import takes seconds; the commands of the lab that only read files do without.
        """
        if not name.startswith("_"):
            for public, place in _MODULES.items():
                module = import_module(f"{__name__}.{place}")
                globals()[public] = module if public == place else getattr(module, public)
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what can be asked for, whether it is imported yet or not."""
    return sorted({*globals(), *__all__})
