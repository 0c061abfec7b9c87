"""Every example runs as a person runs it, and prints the table that it promises; so does the page on networks."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layerwise
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments.runner import load_finished
from layerwise.lab.runs.folder import Runs
from layerwise.lab.tasks import layout
from layerwise.lab.tasks import task as tasks

from .conftest import ROOT

pytestmark = pytest.mark.full

EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
ROWS = {
    "language_model": ["plain", "layer-adaptive", "plain at the mean factor", "the mean factor"],
    "lstm": [
        "plain",
        "layer-adaptive, one LSTM layer",
        "layer-adaptive, one per depth",
        "plain at the last's mean factor",
        "that mean factor",
    ],
    "graph_network": ["plain", "layer-adaptive", "plain at the mean factor", "the mean factor"],
    "vision_transformer": ["plain", "decay of 0.8", "plain at the mean factor", "the mean factor"],
    "lora": ["plain", "A and B two layers", "A and B one layer", "plain at the last's mean"],
}


def test_no_example_of_a_network_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"my_task", "language_model_task"} >= set(ROWS)
    assert all(f"../examples/{name}.py" in PAGE for name in ROWS)
    assert all(len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60 for name in ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_an_example_prints_one_number_a_seed_for_every_arm_and_claims_nothing(name, tmp_path):
    pytest.importorskip("numpy")
    if name == "lora":
        pytest.importorskip("peft")
    environment = {**os.environ, "PYTHONPATH": str(Path(layerwise.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    # PEFT imports torchao and bitsandbytes where they are installed, which write about their own kernels.
    theirs = re.compile(r"torchao|_pytree\.py|kernels-community")
    assert [line for line in result.stderr.splitlines() if not theirs.search(line)] == []
    title, table, words = result.stdout.split("\n\n")
    assert title
    head, *lines = table.splitlines()
    assert head.split() == ["arm", "seed", "0"]
    rows = {line[: line.rindex("  ")].strip(): float(line.split()[-1]) for line in lines}
    assert list(rows) == ROWS[name]
    assert all(math.isfinite(value) and value > 0 for value in rows.values())
    arms = [value for arm, value in rows.items() if not arm.endswith("the mean factor") and arm != "that mean factor"]
    assert len(set(arms)) == len(arms)  # no two arms are the same training
    assert "are a glimpse and no comparison" in words
    assert "row" in words
    assert os.listdir(tmp_path) == []


def test_the_language_model_is_a_task_that_a_comparison_carries_out(tmp_path):
    pytest.importorskip("polars")
    task = tasks.load(f"{EXAMPLES / 'language_model_task.py'}:task", {"steps": 4, "epochs": 1, "width": 8})
    tried = task.tried(validation=True)
    assert (tried.metric, tried.higher_is_better, tried.has_validation) == ("test_loss", False, True)
    assert tried.value == pytest.approx(math.log(128), abs=0.3)  # untrained
    plan = layout.plan(task, seeds=1)
    for chain in plan.chains():
        chains.do_chain(chains.Chain(runs=chain, out=tmp_path, data_dir=None), chains.Alone())
    torch.set_num_threads(1)
    records = load_finished(plan, Runs(tmp_path)).records
    losses = {arm: record.summary["finals"]["test_loss"] for (_, arm, _), record in records.items()}
    assert set(losses) == {"plain", "layer-adaptive", "mean-factor", "shuffled", "frozen"}
    assert len(set(losses.values())) == 5
    assert max(losses.values()) < tried.value
    of_method = next(record for (_, arm, _), record in records.items() if arm == "layer-adaptive")
    assert list(of_method.summary["factor"]["layers"])[:2] == ["embedding", "position"]
    assert min(of_method.summary["factor"]["layers"].values()) > 1


def test_the_code_of_the_page_runs_and_prints_what_it_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    if importlib.util.find_spec("peft") is None:
        blocks = [block for block in blocks if "peft" not in block]
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
        printed = capsys.readouterr().out.strip()
        promised = re.search(r"print\(.*\)  # ([^:\n]+)", block)
        assert bool(printed) == bool(promised)
        if promised:
            begin, *end = promised[1].split(", …, ")
            assert printed.startswith(begin)
            assert printed.endswith(end[0] if end else begin)


def test_the_functions_of_the_page_are_those_of_the_examples():
    for name, example in {"one_a_depth": "lstm", "one_layer_a_target": "lora"}.items():
        found = [
            re.search(rf"def {name}\(.*?\n\n\n", source, re.S)
            for source in (PAGE, (EXAMPLES / f"{example}.py").read_text(encoding="utf-8"))
        ]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][0] == found[1][0]
