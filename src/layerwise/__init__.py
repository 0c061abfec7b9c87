"""Per-layer learning rates for any PyTorch optimizer."""

from . import rules
from .adapter import LayerwiseLR
from .diagnose import diagnose
from .groups import param_groups

__version__ = "0.1.0"

__all__ = ["LayerwiseLR", "diagnose", "param_groups", "rules"]
