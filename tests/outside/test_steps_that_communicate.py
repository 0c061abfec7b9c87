"""Optimizers whose own step communicates: two processes equal one, or a refusal before weights move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded.processes import run
from torch import Tensor, nn, optim

import layerwise
from layerwise.rules import Constant, LayerAdaptive


class SharedOut(optim.Optimizer):
    """Each process steps some parameters of a group, by their positions, and hands them to the others."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            for position, p in enumerate(group["params"]):
                if position % world == rank:
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * v)
            for position, p in enumerate(group["params"]):
                if world > 1:
                    dist.broadcast(p, position % world)


class Averaging(optim.Optimizer):
    """Averages the gradients over the processes in its step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if dist.is_initialized():
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
                p.sub_(group["lr"] * p.grad)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4))).double()


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained(kind: Any, rule: Any, attach_at: int = 0) -> tuple[list[Tensor], str]:
    model = network()
    optimizer = kind(model.parameters())
    place = ""
    for step in range(4):
        if step == attach_at:
            place = layerwise.LayerwiseLR(optimizer, rule, model).apply
        give_gradients(model, step)
        optimizer.step()
    return weights(model), place


def in_each_process(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    factors = Constant({"0": 0.5, "1": 2.0, "2": 0.25})
    found["shared"] = [trained(SharedOut, rule, at) for rule in (factors, LayerAdaptive()) for at in (0, 2)]
    found["averaged before"] = trained(Averaging, LayerAdaptive())
    model = network()
    with pytest.raises(ValueError, match="divides the parameter groups by layer, and SharedOut communicates"):
        layerwise.LayerwiseLR(SharedOut(model.parameters()), factors, model, apply="lr")
    model = network()
    optimizer = Averaging(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    give_gradients(model, rank)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"Average the gradients before step\(\)"):
        optimizer.step()
    assert all(map(torch.equal, before, weights(model)))
    model = network()
    optimizer = Averaging(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model).enabled = rank == 0
    give_gradients(model, rank)
    with pytest.raises(RuntimeError, match=r"Average the gradients before step\(\)"):
        optimizer.step()
    assert all(map(torch.equal, before, weights(model)))
    model = network()
    optimizer = Averaging(model.parameters())
    layerwise.LayerwiseLR(optimizer, factors, model)  # whose factors do not depend on gradients
    give_gradients(model, rank)
    optimizer.step()
    found["constant"] = weights(model)
    found["frozen"] = with_a_frozen_layer()
    return found


def with_a_frozen_layer() -> list[Tensor]:
    model = network()
    model[1].weight.requires_grad_(False)
    optimizer = Averaging(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    give_gradients(model, 0)
    model[1].weight.grad = None
    optimizer.step()
    return weights(model)


@pytest.mark.dist
def test_two_processes_equal_one_or_are_refused() -> None:
    first, second = run(2, in_each_process)
    for name in ("shared", "averaged before", "constant", "frozen"):
        assert str(first[name]) == str(second[name]), name
    expected = [
        trained(SharedOut, rule, at)
        for rule in (Constant({"0": 0.5, "1": 2.0, "2": 0.25}), LayerAdaptive())
        for at in (0, 2)
    ]
    for (found, place), (alone, _) in zip(first["shared"], expected, strict=True):
        assert place == "update"
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, alone, strict=True))
    alone, _ = trained(Averaging, LayerAdaptive())
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(first["averaged before"][0], alone, strict=True))
    assert all(map(torch.allclose, first["frozen"], with_a_frozen_layer()))
    gradients = []
    for rank in range(2):
        model = network()
        give_gradients(model, rank)
        gradients.append([p.grad for p in model.parameters()])
    for p, a, b, f, found in zip(weights(network()), *gradients, (0.5, 2.0, 0.25, 1.0), first["constant"], strict=True):
        assert torch.allclose(found, p - 0.1 * f * (a + b) / 2, rtol=1e-12, atol=1e-14)
