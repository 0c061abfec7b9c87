"""The examples run, say what they promise, fit on a page, and leave nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import layerwise

pytestmark = pytest.mark.full

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightning_trainer": ["lightning", "numpy", "polars"],
    "fabric_loop": ["lightning.fabric", "numpy", "polars"],
    "accelerate_loop": ["accelerate", "numpy", "polars"],
    "hf_trainer": ["transformers", "accelerate", "numpy", "polars"],
}
SAYS = {
    "lightning_trainer": r"accuracy on 1,000 test digits: [6-9]\d\.\d%\n.*\n(  net\.\d(  0\.0\d+){6}\n){3}$",
    "fabric_loop": r"(epoch \d  accuracy [5-9]\d\.\d%  .*5\.weight: 0\.00\d\d  5\.bias: 5\.0000\n){3}"
    r".* goes on with epoch 4\n$",
    "accelerate_loop": r"amplified: none\nepoch 2 .*none\nepoch 3 .* amplified: \d.*\n"
    r"epoch 4 (.*\n){2}(  \d .* z .*\n){5}.* goes on with epoch 5\n$",
    "hf_trainer": r"accuracy on 1,000 test digits: [5-9]\d\.\d%\n.*\n"
    r"  0\.512  vit\.embeddings\n(.*\n)*  1\.000  classifier\n$",
}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_and_says_what_it_promises(name, tmp_path):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(layerwise.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(SAYS[name], result.stdout), result.stdout
    assert not list(tmp_path.iterdir()), "it must leave nothing behind"


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_shorter_than_sixty_lines(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60
