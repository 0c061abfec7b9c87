"""The reference stands by itself: nothing imports it, its examples hold, its norm is right."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference

MODULES = [name for _, name, _ in pkgutil.iter_modules(reference.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(f"reference.{name}")
    assert doctest.testmod(module).failed == 0


def test_reference_imports_neither_torch_nor_layerwise() -> None:
    code = (
        "import sys, reference; sys.exit(any(name.partition('.')[0] in ('torch', 'layerwise') for name in sys.modules))"
    )
    folder = Path(reference.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=folder).returncode == 0
    for name in MODULES:
        module = importlib.import_module(f"reference.{name}")
        assert "torch" not in vars(module)


def test_joint_norm_is_the_norm_of_all_entries() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape) for shape in [(3, 4), (5,), (), (0,)]]
    together = np.concatenate([array.ravel() for array in arrays])
    assert reference.joint_norm(arrays) == pytest.approx(np.linalg.norm(together), rel=1e-14)
    assert reference.joint_norm([]) == 0.0
