"""The program of docs/sharded.md and examples/sharded.py run under torchrun, as a person runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import layerwise

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sharded.py"


def torchrun(count: int, *program: object, folder: Path) -> str:
    """Run a program in several processes, in a folder; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(layerwise.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    result = subprocess.run(
        [*command, *map(str, program)], capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )
    # Seen in a core: a thread of ProcessGroupGloo frees the tensors of the last all-gather while Python shuts down.
    assert result.returncode == 0 or "terminate called without an active exception" in result.stderr, result.stderr
    return result.stdout


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]


@pytest.mark.dist
def test_the_program_of_the_page_saves_and_goes_on(tmp_path):
    page = (ROOT / "docs" / "sharded.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import.*?)```", page, re.S)
    told = "open(f'rank{processes.get_rank()}', 'w').write(f'{adapter.epoch} {adapter.layers}')\nprocesses.barrier()"
    assert program.count("processes.barrier()") == 1
    (tmp_path / "train.py").write_text(program.replace("processes.barrier()", told), encoding="utf-8")
    torchrun(2, "train.py", folder=tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2 ['0', '2']"] * 2


@pytest.mark.dist
def test_the_example_goes_on_with_another_number_of_processes_and_its_records_are_those_of_one(tmp_path):
    pytest.importorskip("numpy")
    assert torchrun(2, EXAMPLE, "two", folder=tmp_path).startswith("after epoch 1, with 2 processes:\nstep 60\n")
    assert torchrun(1, EXAMPLE, "two", folder=tmp_path).startswith("after epoch 2, with 1 process:\nstep 120\n")
    torchrun(1, EXAMPLE, "one", folder=tmp_path)
    together, alone = records(tmp_path / "two"), records(tmp_path / "one")
    assert [record["step"] for record in together] == [20, 40, 60, 80, 100, 120]
    for record, expected in zip(together[:3], alone, strict=True):
        assert record["factor"] == pytest.approx(expected["factor"], rel=1e-3)
        assert record["update_norm"] == pytest.approx(expected["update_norm"], rel=1e-3)
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 60
