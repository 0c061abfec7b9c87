"""Per-layer learning rates for any PyTorch optimizer."""

from . import rules, sinks
from .adapter import LayerwiseLR
from .backward import step_in_backward
from .checkpoints import load_checkpoint
from .diagnose import diagnose
from .groups import param_groups
from .monitor import Monitor

__version__ = "0.1.0"

__all__ = [
    "LayerwiseLR",
    "Monitor",
    "diagnose",
    "load_checkpoint",
    "param_groups",
    "rules",
    "sinks",
    "step_in_backward",
]
