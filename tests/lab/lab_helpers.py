"""A small experiment, and a LeNet written once more by hand."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars
import pytest
import torch
from torch.nn import functional

from layerwise.lab.data import digits
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments import runner as experiment
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.tuned_recipe import TunedRecipe
from layerwise.lab.models.lenet import LeNet
from layerwise.lab.runs.folder import Runs
from layerwise.lab.runs.record import Record, read_about


def tiny_plan(seeds: int = 1, **constants: Any) -> Plan:
    """Lay out a LeNet experiment of a few updates on digits: three solvers, a method, three controls."""
    read = recipe.load("singh2015-table1")
    smoke = read.content["scales"]["smoke"]
    short = {"iterations": 8, "test_every": 4, "test_count": 100, "layers_every": 4}
    changed = {**smoke["constants"], **short, **constants}
    content = {**read.content, "scales": {"smoke": {**smoke, "constants": changed, "columns": [4, 8]}}}
    return recipe.Recipe("tiny", content).plan("smoke", seeds=seeds)


def tiny_tuned(*, iterations: int = 6, **tuned: Any) -> TunedRecipe:
    """Lay out a tuned recipe with few, narrow and short runs: two methods, a control."""
    content = recipe.load("depth-without-normalisation").content
    smoke = content["scales"]["smoke"]
    short = {"iterations": iterations, "test_every": iterations, "layers_every": 6, "test_count": 100}
    scale = {
        **smoke,
        "constants": {**smoke["constants"], **short},
        "subjects": ["sigmoid8", "sigmoid3"],
        "arms": ["plain", "normalised", "mean-factor:normalised", "adam"],
        "tuned": {**smoke["tuned"], "extensions": 0, **tuned},
    }
    return TunedRecipe(recipe.Recipe("tiny", {**content, "scales": {"smoke": scale}}), "smoke")


def stored(runs: Runs) -> list[Record]:
    """Find the finished runs of a folder, in the order of their names."""
    found = [runs.find(read_about(path.parent)[0]) for path in sorted(runs.path.glob("*/record.json"))]
    return [record for record in found if record is not None]


def series_of(record: Record, quantity: str) -> list[tuple[int, float]]:
    """Give the pairs of step and value of a quantity of the whole network."""
    rows = record.metrics().filter((polars.col("quantity") == quantity) & polars.col("layer").is_null())
    return list(rows.select("step", "value").iter_rows())


class Here:
    """The link of a worker that is this very process."""

    def __init__(self, on_message: Callable[[int, Any], None], stop: Callable[[], bool]) -> None:
        self.on_message, self.stopped = on_message, stop

    def doing(self, name: str) -> None:
        """Be told what is worked on."""

    def send(self, message: object) -> None:
        """Pass a message on, from the first worker."""
        self.on_message(0, message)


def do_here(jobs: Sequence[chains.Chain], count: int, *, on_message: Any, stop: Any, on_failure: Any) -> list[Any]:
    """Do the chains of an experiment in this process, one after another."""
    for chain in itertools.takewhile(lambda _: not stop(), jobs):
        chains.do_chain(chain, Here(on_message, stop))
    return []


@contextlib.contextmanager
def runs_in_process() -> Iterator[None]:
    """Let experiments do their runs in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_local", do_here)
        yield
    torch.set_num_threads(threads)


def hand_written_lenet(solver, *, adaptive, iterations, batch_size, seed):
    """Train in float64 with Caffe's update formulas, and return the weights by name: local = rate · lr_mult · m_l."""
    start = LeNet(seed)
    w = {name: p.detach().double().clone().requires_grad_() for name, p in start.named_parameters()}
    h = {name: torch.zeros_like(p) for name, p in w.items()}
    data = digits.load()
    count = len(data.train_labels)
    for k in range(iterations):
        index = torch.arange(k * batch_size, (k + 1) * batch_size) % count
        x, y = data.train_images[index].double() / 256, data.train_labels[index]
        x = functional.max_pool2d(functional.conv2d(x, w["conv1.weight"], w["conv1.bias"]), 2)
        x = functional.max_pool2d(functional.conv2d(x, w["conv2.weight"], w["conv2.bias"]), 2)
        x = functional.relu(functional.linear(x.flatten(1), w["ip1.weight"], w["ip1.bias"]))
        loss = functional.cross_entropy(functional.linear(x, w["ip2.weight"], w["ip2.bias"]), y)
        gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        rate = 0.01 * (1 + 1e-4 * k) ** -0.75
        with torch.no_grad():
            for layer in ("conv1", "conv2", "ip1", "ip2"):
                names = [f"{layer}.weight", f"{layer}.bias"]
                norm = math.sqrt(sum(float((gradients[name] ** 2).sum()) for name in names))
                m = 1 + math.log(1 + 1 / norm) if adaptive else 1.0
                for name, lr_mult in zip(names, (1.0, 2.0), strict=True):
                    local = rate * lr_mult * m
                    d = gradients[name] + 0.0005 * w[name]
                    if solver == "caffe-sgd":
                        h[name] = 0.9 * h[name] + local * d
                        w[name] -= h[name]
                    elif solver == "caffe-nesterov":
                        before = h[name]
                        h[name] = 0.9 * before + local * d
                        w[name] -= 1.9 * h[name] - 0.9 * before
                    else:
                        h[name] = h[name] + d * d
                        w[name] -= local * d / (h[name].sqrt() + 1e-8)
    return {name: p.detach() for name, p in w.items()}
