"""The reference stands by itself: nothing imports it, its examples hold, it mirrors the rules."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import numpy as np
import pytest

from layerwise import reference, rules

MODULES = [name for _, name, _ in pkgutil.iter_modules(reference.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(f"layerwise.reference.{name}")
    assert doctest.testmod(module).failed == 0


def test_package_does_not_import_the_reference() -> None:
    code = "import sys, layerwise; sys.exit(any(name.startswith('layerwise.reference') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reference_does_not_use_torch() -> None:
    for name in MODULES:
        module = importlib.import_module(f"layerwise.reference.{name}")
        assert "torch" not in vars(module)


def test_every_rule_has_a_reference_of_its_name() -> None:
    without = {"base", "elementwise", "measured", "questions", "selection", "state"}  # what rules are made of
    assert {name for _, name, _ in pkgutil.iter_modules(rules.__path__)} - without <= set(MODULES)


def test_joint_norm_is_the_norm_of_all_entries() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape) for shape in [(3, 4), (5,), (), (0,)]]
    together = np.concatenate([array.ravel() for array in arrays])
    assert reference.joint_norm(arrays) == pytest.approx(np.linalg.norm(together), rel=1e-14)
    assert reference.joint_norm([]) == 0.0
