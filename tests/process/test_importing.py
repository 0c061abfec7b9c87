"""What ``import layerwise`` imports, and gives."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import layerwise


def test_importing_the_package_imports_no_torch_and_its_names_are_there() -> None:
    program = """
import sys
import layerwise
assert "torch" not in sys.modules
assert not hasattr(layerwise, "__wrapped__") and "torch" not in sys.modules
assert set(layerwise.__all__) <= set(dir(layerwise))
from layerwise import diagnose, rules
assert callable(diagnose) and rules.LayerAdaptive.__module__ == "layerwise.rules.layer_adaptive"
for name in layerwise.__all__:
    assert name in vars(layerwise), name
assert not hasattr(layerwise, "nothing_of_this_name")
import importlib, pkgutil
for module in pkgutil.iter_modules(layerwise.__path__):
    if not module.name.startswith("__"):
        importlib.import_module(f"layerwise.{module.name}")
assert callable(layerwise.diagnose) and callable(layerwise.step_in_backward)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_module_takes_the_place_of_a_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(layerwise.__path__)}
    assert modules & set(layerwise.__all__) == {"rules", "sinks"}


def test_the_version_of_torch_is_told_without_importing_it() -> None:
    program = """
import sys
from layerwise.lab.runs.store import versions
told = versions()
assert "torch" not in sys.modules
import layerwise, torch
assert told == {"layerwise": layerwise.__version__, "torch": str(torch.__version__)}, told
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
