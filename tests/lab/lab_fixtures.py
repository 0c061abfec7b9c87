"""What the tests of the lab share: experiments done in this process, and the folder of the full data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lab_helpers import runs_in_process

from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.runner import Outcome, Settings, load_finished
from layerwise.lab.runs.folder import Runs


@pytest.fixture
def one_thread():
    """Train on one thread, as workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def carried_out(tmp_path: Path, one_thread: None) -> Callable[..., Outcome]:
    """Return a function that does a plan in this process and gives its outcome."""

    def do(plan: Plan, out: Path = tmp_path / "runs", data_dir: Path | None = None) -> Outcome:
        for chain in plan.chains():
            told = plan.labels(chain[0].subject)
            chains.do_chain(chains.Chain(runs=chain, out=out, data_dir=data_dir, labels=told), chains.Alone())
        torch.set_num_threads(1)
        return Outcome(plan, Settings(out=out, data_dir=data_dir), load_finished(plan, Runs(out)))

    return do


@pytest.fixture
def in_process() -> Iterator[None]:
    """Let experiments do their runs in this process, where workers are not what is tested."""
    with runs_in_process():
        yield


@pytest.fixture
def data_folder() -> Path:
    """Give the folder of the full data sets, or skip."""
    place = os.environ.get("LAYERWISE_DATA")
    if not place:
        pytest.skip("LAYERWISE_DATA is not set: the full data sets are not tested")
    return Path(place)


@pytest.fixture
def mnist_folder(data_folder: Path) -> Path:
    """Give the folder of the full MNIST, or skip."""
    return data_folder
