"""Attaching to an optimizer that is not torch's own is quick, and leaves the program around it alone."""

from __future__ import annotations

import logging
import random
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise.rules import Constant

taken: list[int] = []


class Plain(optim.Optimizer):
    """Steps as SGD, and counts the parameters that it has stepped."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    taken.append(1)
                    p.sub_(group["lr"] * p.grad)


class WithFirstRates(Plain):
    """Keeps a list with an entry for each group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.first_rates = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, first in zip(self.param_groups, self.first_rates, strict=False):
            for p in group["params"]:
                if p.grad is not None:
                    taken.append(1)
                    p.sub_(first * group["lr"] * p.grad)


def network(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).double()


def steps_of_a_trial(kind: Any, groups: int) -> int:
    """Return how many parameters the trial of an optimizer with that many groups has stepped."""
    taken.clear()
    model = network(groups)
    optimizer = kind([{"params": list(layer.parameters())} for layer in model])
    layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model)
    return len(taken)


@pytest.mark.parametrize("kind", [Plain, WithFirstRates])
def test_hundreds_of_groups_are_tried_as_fast_as_sixteen(kind: Any) -> None:
    assert 0 < steps_of_a_trial(kind, 300) <= steps_of_a_trial(kind, 16)


@pytest.mark.parametrize("kind", [Plain, WithFirstRates])
def test_each_of_many_groups_is_scaled(kind: Any) -> None:
    model = network(40)
    # Every group has parameters of two layers.
    groups = [{"params": [*model[i].parameters(), *model[i + 1].parameters()]} for i in range(0, 40, 2)]
    optimizer = kind(groups)
    factors = {str(i): 0.5 + i / 10 for i in range(40)}
    layerwise.LayerwiseLR(optimizer, Constant(factors), model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rate = 0.1 if kind is Plain else 0.01
    for number, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        expected = old - rate * factors[str(number // 2)]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_attaching_in_several_threads_restores_console_and_generators() -> None:
    kinds: list[Any] = [type(f"Plain{number}", (Plain,), {}) for number in range(8)]
    places: list[str] = []
    models = [network(4) for _ in kinds]
    console, drawn, own = sys.stdout, torch.get_rng_state(), random.getstate()

    def attach(kind: Any, model: nn.Module) -> None:
        adapter = layerwise.LayerwiseLR(kind(model.parameters()), Constant({"0": 0.5}), model)
        places.append(adapter.apply)

    threads = [threading.Thread(target=attach, args=pair) for pair in zip(kinds, models, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert sys.stdout is console
    finally:
        sys.stdout = console
    assert places == ["lr"] * 8
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == own


def test_what_a_step_writes_and_logs_is_not_heard_at_attachment(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Loud(Plain):
        def step(self, closure: Any = None) -> None:
            sys.stdout.write("a step\n")
            sys.stderr.write("a step\n")
            logging.getLogger("mine").error("a step")
            super().step()

    model = network(4)
    optimizer = Loud(model.parameters())
    layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model)
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert capsys.readouterr() == ("a step\n", "a step\n")
    assert caplog.messages == ["a step"]


def test_parameters_elsewhere_than_the_default_device_can_be_attached_to() -> None:
    class Elsewhere(Plain):
        pass

    model = network(4)
    optimizer = Elsewhere(model.parameters())
    with torch.device("meta"):
        adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model)
    assert adapter.apply == "lr"
