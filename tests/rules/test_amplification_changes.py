"""Amplification when the network, the optimizer or the file changes under it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import layerwise
from layerwise.apply import Factors
from layerwise.rules import (
    AllLayers,
    Constant,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    LayerFreezing,
    Phase,
    RandomLayers,
    chain,
)

PHASES = [Phase(1, False), Phase(5, True), Phase(9, True)]


class Named(nn.Module):
    """Layers whose names begin with underscores."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("_stem", "middle", "_norm", "_fc"):
            layer = nn.Linear(3, 3, dtype=torch.float64)
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            setattr(self, name, layer)


def sgd(parameters: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **{"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05, **options})


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + 0.3


def epoch_of(model: nn.Module, optimizer: Any, epoch: int, steps: range = range(4)) -> None:
    for step in steps:
        give_gradients(model, 100 * epoch + step)
        optimizer.step()


@pytest.mark.parametrize("epoch", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize(
    "wrap", [lambda rule: rule, lambda rule: chain(rule, Constant({"*": 1.0}))], ids=["alone", "chain"]
)
@pytest.mark.parametrize(
    "rule",
    [
        GradientAmplification(Directionality(threshold=0.2), PHASES),
        GradientAmplification(RandomLayers(0.5), PHASES),
        LayerFreezing(0.3, start=1, every=2),
    ],
    ids=["Directionality", "RandomLayers", "LayerFreezing"],
)
def test_parameters_added_in_any_epoch_change_nothing_for_the_others(epoch: int, wrap: Any, rule: Any) -> None:
    seen = []
    for added in (False, True):
        model = Named()
        optimizer = sgd([p for name, p in model.named_parameters() if not name.startswith("_fc")])
        adapter = layerwise.LayerwiseLR(optimizer, wrap(rule), model)
        rows = []
        for number in range(1, 9):
            epoch_of(model, optimizer, number, range(2))
            if added and number == epoch:
                optimizer.add_param_group({"params": [*model._fc.parameters()]})
                model._fc.requires_grad_(False)  # not a candidate, so that the others' z stays what it was
            epoch_of(model, optimizer, number, range(2, 4))
            factors = adapter.get_last_factors()
            adapter.end_epoch()
            values = {name: one.value for name, one in adapter.get_last_selection().items()}
            rows.append([(factors[name], values[name]) for name in ("_stem", "middle", "_norm")])
        seen.append(rows)
    if "RandomLayers" in repr(rule):  # its draws depend on the number of layers; until the next one they stay
        later = next((e for e in (2, 6) if e > epoch), 9)
        seen = [rows[: later - 1] for rows in seen]
    assert repr(seen[0]) == repr(seen[1])


def test_sums_of_parameters_with_underscores_are_saved() -> None:
    found = []
    for interrupted in (False, True):
        model = Named()
        optimizer = sgd(model.parameters())
        rule = GradientAmplification(Directionality(threshold=0.2), [Phase(4, True)])
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
        epoch_of(model, optimizer, 1, range(3))
        if interrupted:
            saved = adapter.state_dict()
            adapter.detach()
            adapter = layerwise.LayerwiseLR(optimizer, rule, model)
            adapter.load_state_dict(saved)
        epoch_of(model, optimizer, 1, range(3, 6))
        adapter.end_epoch()
        found.append(adapter.get_last_selection())
    assert found[0] == found[1]


def test_a_chain_with_factors_of_the_device_works_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Factors, "read", lambda self: [2.5] * 3)
    with FakeTensorMode():
        named = {f"{i}.weight": nn.Parameter(torch.empty(3, 3, device="cuda")) for i in range(3)}
        optimizer = torch.optim.SGD(named.items(), lr=0.1, momentum=0.9)
        rule = chain(GradientAmplification(AllLayers(after_analysis=False), [Phase(3, True)]), LayerAdaptive())
        layerwise.LayerwiseLR(optimizer, rule)
        for p in named.values():
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float32])
def test_the_factor_does_not_pass_through_the_default_type(default: torch.dtype) -> None:
    model = Named()
    torch.set_default_dtype(default)
    try:
        rule = GradientAmplification(AllLayers(after_analysis=False), [Phase(3, True, 100000.1)])
        optimizer = sgd(model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
        epoch_of(model, optimizer, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(adapter.get_last_factors().values()) == {100000.1}


def test_the_default_device_does_not_matter() -> None:
    model = Named()
    torch.set_default_device("meta")
    try:
        optimizer = sgd(model.parameters())
        for selection in (RandomLayers(0.5), Directionality(threshold=0.0)):
            rule = GradientAmplification(selection, [Phase(3, True)])
            adapter = layerwise.LayerwiseLR(optimizer, rule, model)
            for step in range(2):
                for i, p in enumerate(model.parameters()):
                    p.grad = torch.full_like(p, (-1.0) ** (step * (i // 2)))
                optimizer.step()
            adapter.end_epoch()
            assert any(one.selected for one in adapter.get_last_selection().values())
            adapter.detach()
    finally:
        torch.set_default_device(None)


def test_layers_may_be_frozen_and_thawed_after_attaching() -> None:
    model = Named()
    model._stem.requires_grad_(False)
    optimizer = sgd(model.parameters())
    rule = GradientAmplification(Directionality(threshold=0.0), [Phase(1, False), Phase(9, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    epoch_of(model, optimizer, 1)
    adapter.end_epoch()
    model._stem.requires_grad_(True)
    model._fc.requires_grad_(False)
    epoch_of(model, optimizer, 2)
    adapter.end_epoch()
    found = adapter.get_last_selection()
    assert not math.isnan(found["_stem"].z)
    assert math.isnan(found["_fc"].z)
    assert not found["_fc"].selected
    assert sum(found[name].z for name in ("_stem", "middle", "_norm")) == pytest.approx(0, abs=1e-9)


def test_excluded_layers_are_neither_measured_nor_chosen() -> None:
    for selection, chosen in ((RandomLayers(0.5), 1), (AllLayers(), 2), (Directionality(threshold=0.0), 1)):
        model = Named()
        optimizer = sgd(model.parameters())
        rule = GradientAmplification(selection, [Phase(3, True)])
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, exclude=["_*m"])
        epoch_of(model, optimizer, 1)
        adapter.end_epoch()
        found = adapter.get_last_selection()
        assert sum(one.selected for one in found.values()) == chosen
        assert not found["_stem"].selected
        assert not found["_norm"].selected
        assert math.isnan(found["_stem"].value)


def test_sums_of_other_phases_are_dropped() -> None:
    model = Named()
    optimizer = sgd(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(Directionality(), [Phase(9, True)]), model)
    epoch_of(model, optimizer, 1)
    saved = adapter.state_dict()
    assert saved["state"]["sums"]
    adapter.detach()
    later = GradientAmplification(Directionality(), [Phase(1, False), Phase(9, True)])
    adapter = layerwise.LayerwiseLR(optimizer, later, model)
    adapter.load_state_dict(saved)
    assert not adapter.state_dict()["state"]["sums"]


@pytest.mark.parametrize("name", ["epoch", "draw"])
@pytest.mark.parametrize("value", ["3", -4, 1.5])
def test_a_damaged_state_is_refused(name: str, value: Any) -> None:
    model = Named()
    adapter = layerwise.LayerwiseLR(sgd(model.parameters()), GradientAmplification(AllLayers(), PHASES), model)
    saved = adapter.state_dict()
    saved["state"][name] = value
    with pytest.raises(ValueError, match=f"{name} of the saved state"):
        adapter.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1e-10, 1e-4, 0.5])
def test_small_factors_leave_plain_decay_plain(dtype: torch.dtype, factor: float) -> None:
    momenta = []
    for apply in ("auto", "gradient"):
        parameter = nn.Parameter(torch.full((1,), 2.0, dtype=dtype))
        optimizer = torch.optim.SGD([("a", parameter)], lr=0.0, momentum=0.9, weight_decay=0.05)
        amplification = GradientAmplification(AllLayers(), [Phase(9, False)])
        layerwise.LayerwiseLR(optimizer, chain(amplification, Constant({"*": factor})), layers="parameter", apply=apply)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        momenta.append(optimizer.state[parameter]["momentum_buffer"].item())
    assert momenta[0] == pytest.approx(momenta[1], rel=1e-12 if dtype is torch.float64 else 1e-3)


@pytest.mark.parametrize("phases", [5, None, Phase(5, True)], ids=str)
def test_phases_that_are_no_list_are_refused(phases: Any) -> None:
    with pytest.raises(TypeError, match=r"must be Phase\(until, amplify, factor\), at least one"):
        GradientAmplification(AllLayers(), phases)


def test_kinds_flags_and_seeds_are_checked_or_taken() -> None:
    with pytest.raises(ValueError, match="kinds holds"):
        AllLayers(("conv", ["fc"]))
    with pytest.raises(TypeError, match="after_analysis='no' must be True or False"):
        AllLayers(after_analysis="no")
    with pytest.raises(ValueError, match="ddof=True"):
        Directionality(ddof=True)
    assert sum(RandomLayers(0.5, seed=2**62).choose([True] * 4, [], 0)) == 2


def test_what_can_never_amplify_is_told_when_attached(caplog: pytest.LogCaptureFixture) -> None:
    model = Named()
    for phases in ([Phase(4, False)], [Phase(1, False), Phase(2, True), Phase(4, False)]):
        caplog.clear()
        layerwise.LayerwiseLR(
            sgd(model.parameters()), GradientAmplification(Directionality(threshold=1.0), phases), model
        )
        assert [r.getMessage()[:42] for r in caplog.records] == ["no epoch of these phases is amplified: [Ph"]
    caplog.clear()
    layerwise.LayerwiseLR(sgd(model.parameters()), GradientAmplification(Directionality(threshold=1.8), PHASES), model)
    assert [r.getMessage() for r in caplog.records] == ["threshold=1.8 chooses nothing: z of 4 layers is at most 1.73"]


def test_an_epoch_without_steps_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Named()
    rule = GradientAmplification(Directionality(threshold=0.5), [Phase(9, True)])
    optimizer = sgd(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    assert "epoch 1" in repr(adapter)
    adapter.end_epoch()
    assert "epoch 1: no step of it counted; was end_epoch() called twice?" in [r.getMessage() for r in caplog.records]
    assert "epoch 2" in repr(adapter)
