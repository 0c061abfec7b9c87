"""Weights that runs begin from, in worker processes: trained by one of them, killed at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.runner import Settings, carry_out
from layerwise.lab.training import pretraining

pytestmark = pytest.mark.full

SCRIPT = """
import sys
from pathlib import Path
import torch
from layerwise.lab.experiments import recipe
from layerwise.lab.training import pretraining

torch.set_num_threads(1)
before = recipe.load("surgical-shift").plan("smoke").runs[0].configuration.pretraining
pretraining.weights(before, Path(sys.argv[1]), checkpoint_seconds=0.0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_weights_whose_training_was_killed_are_the_same_bits(tmp_path, one_thread):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    before = recipe.load("surgical-shift").plan("smoke").runs[0].configuration.pretraining
    place = pretraining.folder_of(before, tmp_path / "killed").path
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed")], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (place / "checkpoint-before.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (place / "checkpoint-before.pt").exists()  # it was killed in the middle, not before the first update
    again = pretraining.weights(before, tmp_path / "killed")
    whole = pretraining.weights(before, tmp_path / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_workers_side_by_side_train_the_weights_once(tmp_path):
    content = recipe.load("surgical-shift").content
    scale = {**content["scales"]["smoke"], "arms": ["plain", "first-block"], "seeds": 1}
    plan = recipe.Recipe("tiny", {**content, "scales": {"smoke": scale}}).plan("smoke")
    outcomes = [carry_out(plan, Settings(out=tmp_path / name, jobs=jobs)) for name, jobs in (("two", 2), ("one", 1))]
    assert all(outcome.complete and not outcome.set_aside for outcome in outcomes), outcomes
    assert len(list((tmp_path / "two" / pretraining.FOLDER).iterdir())) == 1
    two, one = ({key: each.summary["weights"] for key, each in found.results.records.items()} for found in outcomes)
    assert two == one
