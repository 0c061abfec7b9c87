"""Layers measured just before their update give the bits of layers measured beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fused import ADAGRAD_TAKES_A_TENSOR, CASES, everything, made, train
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

import layerwise
from layerwise import _fused as fused
from layerwise import _norms as norms
from layerwise import adapter as attaching
from layerwise.apply import Factors
from layerwise.rules import LARC, LARS, Constant, ElementwiseRule, LayerAdaptive
from layerwise.statistics import LayerStatistics

RULES = [LayerAdaptive(), LARS(), LARC(clip=False), LARC()]
MAKERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.05, fused=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))


def attached(optimizer: str, rule: Any, **arguments: Any) -> tuple[nn.Module, optim.Optimizer, Any]:
    model = network()
    made_optimizer = MAKERS[optimizer](model.parameters())
    return model, made_optimizer, layerwise.LayerwiseLR(made_optimizer, rule, model, **arguments)


@pytest.mark.filterwarnings("ignore:.*in no layer")
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", CASES)
def test_measured_in_chunks_or_beforehand_the_bits_are_the_same(name, scaled, monkeypatch):
    _, before, reference = made(name)
    train(before, scaled=scaled)
    assert type(reference._attached.factors) is Factors
    monkeypatch.setattr(fused, "CHUNK", 1)
    _, optimizer, adapter = made(name)
    train(optimizer, scaled=scaled)
    in_chunks = not scaled and (name != "Adagrad" or ADAGRAD_TAKES_A_TENSOR)
    assert type(adapter._attached.factors) is (fused.FactorsInChunks if in_chunks else Factors)
    assert adapter.get_last_factors() == reference.get_last_factors()
    assert len(set(adapter.get_last_factors().values())) > 3
    for actual, expected in zip(everything(optimizer), everything(before), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_every_rule_gives_the_same_bits(name, rule, monkeypatch):
    _, before, reference = attached(name, rule)
    train(before)
    monkeypatch.setattr(fused, "CHUNK", 1)
    _, optimizer, adapter = attached(name, rule)
    train(optimizer)
    assert type(adapter._attached.factors) is fused.FactorsInChunks
    assert adapter.get_last_factors() == reference.get_last_factors()
    assert all(map(torch.equal, everything(optimizer), everything(before)))


def test_layers_are_measured_between_the_updates_of_others_and_each_once(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 16)
    model, optimizer, _ = attached("SGD", LARS())
    train(optimizer, steps=1)
    weights = [p for p in model.parameters() if p.ndim > 1]  # of 12, 16 and 8 numbers: two pieces
    numbers, updated = LayerStatistics.numbers, []

    def measured(self: LayerStatistics, *arguments: Any) -> Any:
        updated.append((self.count, [not torch.equal(p, old) for p, old in zip(weights, before, strict=True)]))
        return numbers(self, *arguments)

    monkeypatch.setattr(LayerStatistics, "numbers", measured)
    before = [p.detach().clone() for p in weights]
    optimizer.step()
    assert updated == [(2, [False, False, False]), (1, [True, True, False])]


def test_excluded_layers_are_not_measured(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    model, optimizer, adapter = attached("AdamW", LayerAdaptive(), exclude=["1", "3"])
    train(optimizer)
    measured = [statistics.members for _, statistics in adapter._attached.found.chunks.members]
    assert [[id(p) for p in members] for members in measured] == [
        list(map(id, model[0].parameters())),
        list(map(id, model[2].parameters())),
    ]
    factors = adapter.get_last_factors()
    assert factors["1"] == factors["3"] == 1 != factors["0"]


def test_more_layers_than_plain_numbers_are_used_for_are_measured_in_chunks_too(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    results = []
    for limit in (256, 2):
        monkeypatch.setattr(attaching, "MOST_NUMBERS", limit)
        _, optimizer, adapter = attached("SGD", LayerAdaptive())
        train(optimizer)
        assert type(adapter._attached.factors) is fused.FactorsInChunks
        results.append(everything(optimizer))
    assert all(map(torch.equal, *results))


class Own(ElementwiseRule):
    """A rule of somebody's own, which raises when a gradient is large."""

    def factor(self, gradient_norm):
        if isinstance(gradient_norm, float) and gradient_norm > 1e3:
            raise ValueError("too large")
        return 1 + gradient_norm


def test_a_rule_of_ones_own_may_raise_before_anything_has_changed(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    model, optimizer, _ = attached("SGD", Own())
    train(optimizer)
    before = [x.clone() for x in everything(optimizer)]
    model[3].weight.grad.fill_(1e6)
    with pytest.raises(ValueError, match="too large"):
        optimizer.step()
    assert all(map(torch.equal, everything(optimizer), before))


@pytest.mark.parametrize("seen", ["hook", "adapter", "unfused"])
def test_where_others_may_see_the_gradients_layers_are_measured_beforehand(seen, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    model, optimizer, adapter = attached("AdamW", LayerAdaptive())
    if seen == "hook":
        optimizer.register_step_pre_hook(lambda *arguments: None)
    elif seen == "adapter":
        layerwise.LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
    else:
        optimizer.param_groups[0]["fused"] = False
    train(optimizer)
    assert type(adapter._attached.factors) is Factors


def test_a_monitor_sees_the_factors_of_the_step(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    model, optimizer, adapter = attached("AdamW", LayerAdaptive())
    sink = layerwise.sinks.Memory()
    layerwise.Monitor(optimizer, model, every=1, sinks=[sink])
    for _ in range(3):
        train(optimizer, steps=1)
        assert list(sink.records[-1].factor) == pytest.approx(list(adapter.get_last_factors().values()), rel=1e-12)


def test_the_factors_of_a_step_stay_when_gradients_are_gone(monkeypatch):
    """A layer that no kernel is called for is measured when the step ends."""
    _, before, reference = attached("SGD", LayerAdaptive())
    monkeypatch.setattr(fused, "CHUNK", 1)
    _, optimizer, adapter = attached("SGD", LayerAdaptive())
    for each in (before, optimizer):
        train(each, steps=2)
        each.param_groups[0]["params"][4].grad = each.param_groups[0]["params"][5].grad = None
        each.step()
        for p in each.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 7.0)
    assert adapter.get_last_factors() == reference.get_last_factors()
    assert adapter.get_last_factors()["2"] == 1


def test_large_tensors_are_cut_into_rows_here_too(monkeypatch):
    monkeypatch.setattr(norms, "MIDDLE", 1024)
    results = []
    for piece in (float("inf"), 2048):
        monkeypatch.setattr(fused, "CHUNK", piece)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        optimizer = MAKERS["SGD"](model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        train(optimizer)
        results.append((type(adapter._attached.factors), everything(optimizer)))
    assert [kind for kind, _ in results] == [Factors, fused.FactorsInChunks]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_lazy_modules_are_attached_to_before_they_have_a_size():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    model(torch.ones(3, 5)).sum().backward()
    optimizer.step()
    assert all(factor > 1 for factor in adapter.get_last_factors().values())


@pytest.mark.filterwarnings("ignore:the optimizer's parameters hold no values")
def test_parameters_without_memory_are_attached_to():
    with FakeTensorMode():
        model = network()
        optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert adapter.layers == ["0", "1", "2", "3"]


def test_a_step_that_fails_leaves_the_factors_of_the_step_before(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    model, optimizer, adapter = attached("AdamW", LayerAdaptive())
    train(optimizer)
    factors, rates = adapter.get_last_factors(), adapter.get_last_lr()
    optimizer.param_groups[0]["lr"] = 0.5
    model[3].weight.grad = torch.ones_like(model[3].weight).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    optimizer.zero_grad()
    assert (adapter.get_last_factors(), adapter.get_last_lr()) == (factors, rates)
    train(optimizer, steps=1)
    assert adapter.get_last_lr() == {name: 0.5 * f for name, f in adapter.get_last_factors().items()}


def test_parameters_that_share_memory_are_measured_beforehand(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    model = network()
    model[3].weight = nn.Parameter(model[2].weight.data[:2])
    optimizer = MAKERS["SGD"](model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    train(optimizer)
    assert type(adapter._attached.factors) is Factors


@pytest.mark.parametrize("rule", [LARC(), LARS()], ids=repr)
def test_a_parameter_that_changes_its_group_takes_the_rate_and_the_decay_there(rule):
    model = network()
    first, *rest = (p for p in model.parameters() if p.ndim > 1)
    optimizer = optim.SGD([{"params": [first, rest[0]]}, {"params": rest[1:], "lr": 1.0, "weight_decay": 0.5}], lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    train(optimizer, steps=1)
    groups = optimizer.param_groups
    groups[1]["params"].insert(0, groups[0]["params"].pop())
    weight = rest[0].detach().double().norm().item()
    generator = torch.Generator().manual_seed(1)
    for p in (first, *rest):
        p.grad = torch.randn(p.shape, generator=generator)
    gradient = rest[0].grad.double().norm().item()
    optimizer.step()
    name = adapter.layers[1]
    expected = rule.factor(gradient, weight, 0.5 * weight, *([1.0] if isinstance(rule, LARC) else []))
    assert adapter.get_last_factors()[name] == pytest.approx(expected, rel=1e-6)
    assert adapter.get_last_lr()[name] == pytest.approx(expected, rel=1e-6)
