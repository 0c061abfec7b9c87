"""Importing the package costs no more than importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layerwise

SOURCE = str(Path(layerwise.__file__).parents[1])


def modules_after(statement):
    """Return the names in sys.modules after a statement in a fresh interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return set(json.loads(result.stdout))


@pytest.fixture(scope="module")
def of_torch():
    return modules_after("import torch")


@pytest.fixture(scope="module")
def of_layerwise():
    return modules_after("import layerwise; layerwise.LayerwiseLR")


def test_no_third_party_package_is_imported_but_torch(of_torch, of_layerwise):
    allowed = {name.partition(".")[0] for name in of_torch} | sys.stdlib_module_names | {"layerwise"}
    assert {name.partition(".")[0] for name in of_layerwise} <= allowed
    assert "torch" in of_layerwise


@pytest.mark.parametrize("name", ["torch._dynamo", "torch._inductor", "numpy", "torch.distributed.tensor"])
def test_nothing_slow_of_torch_is_imported_that_torch_leaves_out(of_torch, of_layerwise, name):
    assert name in of_torch or name not in of_layerwise


def test_the_lab_is_not_imported(of_layerwise):
    assert not [name for name in of_layerwise if name.startswith("layerwise.lab")]


def test_the_public_names_exist():
    assert set(layerwise.__all__) >= {"LayerwiseLR", "diagnose", "param_groups", "rules"}
    assert all(hasattr(layerwise, name) for name in layerwise.__all__)
    assert all(hasattr(layerwise.rules, name) for name in layerwise.rules.__all__)
