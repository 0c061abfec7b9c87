"""Rules that are asked when the step has been taken: LAMB, OrScale, aligned and bounded updates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise import LayerwiseLR
from layerwise.rules import AlignUpdates, LayerAdaptive, Trust, UpdateClip, UpdateFloor, chain
from layerwise.statistics import Statistics
from packages import imported, is_here


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == large] for large in (True, False))
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def backward(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    p = next(model.parameters())
    inputs, targets = (torch.randn(16, n, generator=generator, dtype=torch.float64).to(p.dtype) for n in (5, 3))
    model.zero_grad()
    loss = (model(inputs) - targets).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, steps: int = 50) -> list[torch.Tensor]:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def furthest(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, second, strict=True))


@pytest.fixture
def lamb() -> Any:
    """timm's Lamb."""
    if "timm" not in sys.modules and not is_here("timm"):
        pytest.skip("timm is not installed")
    return imported("timm.optim").Lamb


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)], ids=["LAMB", "LAMBC"])
@pytest.mark.parametrize("fused", [False, True])
def test_trust_on_adamw_is_lamb(lamb: Any, clip: Any, fused: bool) -> None:
    model, alike = network(), network()
    optimizer = torch.optim.AdamW(groups(model, 0.01), lr=0.01, eps=1e-6, fused=fused)
    adapter = LayerwiseLR(optimizer, Trust(clip=clip), model)
    theirs = lamb(groups(alike, 0.01), lr=0.01, eps=1e-6, max_grad_norm=None, trust_clip=clip is not None)
    assert furthest(train(model, optimizer), train(alike, theirs)) <= 1e-12
    factors = adapter.get_last_factors()
    assert factors["0.bias"] == factors["2.weight"] == 1
    assert clip is not None or factors["0.weight"] != 1


def by_hand(model: nn.Module, optimizer: Any, factor: Callable[[int, float, float], float], steps: int = 20) -> Any:
    """Train with each matrix's step scaled afterwards, from ‖w‖ and ‖Δw‖ / lr; return weights and factors."""
    factors: list[dict[int, float]] = []
    for step in range(steps):
        backward(model, step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        factors.append({})
        with torch.no_grad():
            for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
                if p.ndim > 1:
                    direction = float((p - old).norm()) / optimizer.param_groups[0]["lr"]
                    factors[-1][i] = factor(i, float(old.norm()), direction)
                    p.copy_(old + factors[-1][i] * (p - old))
    return [p.detach() for p in model.parameters()], factors


def test_orscale_on_muon_begins_at_the_rate_of_the_optimizer() -> None:
    make: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    model, alike = (nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)) for _ in "ab")
    alike.load_state_dict(model.state_dict())
    adapter = LayerwiseLR(
        optimizer := torch.optim.Muon(model.parameters(), **make), Trust(calibrate=True, clip=(0.1, 5.0)), model
    )
    backward(model, 0)
    optimizer.step()
    assert set(adapter.get_last_factors().values()) == {1.0}
    first: dict[int, float] = {}

    def ratio(i: int, weight: float, direction: float) -> float:
        first.setdefault(i, weight / direction)
        return min(max(weight / direction / first[i], 0.1), 5.0)

    for step in range(1, 20):
        backward(model, step)
        optimizer.step()
    expected, factors = by_hand(alike, torch.optim.Muon(alike.parameters(), **make), ratio)
    assert furthest([p.detach() for p in model.parameters()], expected) <= 1e-4  # Muon iterates in bfloat16
    assert list(adapter.get_last_factors().values()) == pytest.approx(list(factors[-1].values()), rel=1e-3)
    assert len({*factors[-1].values(), 1.0}) == 3


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (UpdateFloor(9), lambda i, weight, direction: max(1.0, 9 * weight / direction)),
        (Trust(exponent=0.5), lambda i, weight, direction: (weight / direction) ** 0.5),
        (Trust(numerator="rms"), lambda i, weight, direction: weight / {0: 35, 4: 21}[i] ** 0.5 / direction),
    ],
    ids=["floor", "root", "rms"],
)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad", "ASGD"])
def test_the_step_is_that_scaled_by_hand(rule: Any, factor: Any, optimizer: str) -> None:
    model, alike = network(), network()
    make = getattr(torch.optim, optimizer)
    own = make(model.parameters(), lr=0.01)
    LayerwiseLR(own, rule, model)
    expected, factors = by_hand(alike, make(alike.parameters(), lr=0.01), factor)
    assert furthest(train(model, own, 20), expected) <= 1e-12
    assert any(f != 1 for step in factors for f in step.values())


def test_a_clipped_update_has_at_most_the_limit_of_root_mean_square() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LayerwiseLR(optimizer, UpdateClip(1e-3), model)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [float(p.grad.square().mean().sqrt()) for p in model.parameters()]
    optimizer.step()
    for p, old, own in zip(model.parameters(), before, gradients, strict=True):
        shown = float((p.detach() - old).square().mean().sqrt()) / 0.1
        assert shown == pytest.approx(min(own, 1e-3), rel=1e-9)


def test_vectors_of_muon_l() -> None:
    rule = AlignUpdates(within=lambda name: "one", smooth=0.9)
    layers = [layerwise.layers.Layer(name, (torch.zeros(2, 2),)) for name in "abc"]
    state = rule.init(layers, torch.device("cpu"))
    ratios = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    measured = Statistics(weight_norm=torch.ones(3, dtype=torch.float64), direction_norm=ratios)
    factors, state = rule.factors(measured, state)
    expected = [1.7142857142857142, 0.8571428571428571, 0.42857142857142855]
    assert factors.tolist() == pytest.approx(expected, rel=1e-14)
    later = Statistics(weight_norm=torch.ones(3, dtype=torch.float64), direction_norm=ratios.flip(0))
    for step in range(1, 5):  # asked again in the first period, for layers without an answer
        assert rule.asks(state) == (step in (1, 2, 4))
        factors, state = rule.factors(later if rule.asks(state) else Statistics(), state)
        assert factors.tolist() == pytest.approx(expected, rel=1e-14)
    t_muon = Statistics(weight_norm=torch.tensor([3.0, 1.0, 2.0]).double(), direction_norm=torch.ones(3).double())
    fresh = rule.init(layers, torch.device("cpu"))
    assert rule.factors(t_muon, fresh)[0].tolist() == pytest.approx([1.5, 0.5, 1.0], rel=1e-14)


def test_the_moving_average_of_aligned_updates_is_corrected_for_its_beginning() -> None:
    rule = AlignUpdates(every=1, smooth=0.5)
    layers = [layerwise.layers.Layer(name, (torch.zeros(2, 2),)) for name in "ab"]
    state = rule.init(layers, torch.device("cpu"))
    scales = []
    for direction in ([1.0, 3.0], [2.0, 2.0], [4.0, 1.0]):
        u = torch.tensor(direction, dtype=torch.float64)
        factors, state = rule.factors(Statistics(weight_norm=torch.ones(2).double(), direction_norm=u), state)
        mean = 2 / sum(1 / x for x in direction)
        scales.append(mean / direction[0])
        weights = [0.5 ** (len(scales) - i) for i in range(len(scales))]
        expected = sum(w * s for w, s in zip(weights, scales, strict=True)) / sum(weights)
        assert float(factors[0]) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("place", ["lr", "gradient"])
def test_other_places_are_refused_with_the_remedy(place: Any) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="use apply='update'") as error:
        LayerwiseLR(optimizer, Trust(), model, apply=place)
    assert "finished step" in str(error.value)
    LayerwiseLR(optimizer, Trust(), model, apply="update")


def test_rules_for_different_places_are_not_chained() -> None:
    with pytest.raises(ValueError, match="act at different places"):
        chain(layerwise.rules.AGC(), Trust())
    assert chain(LayerAdaptive(), Trust()).places == ("update",)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_rate_of_zero_leaves_the_weights_alone(rate: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(groups(model, 0.0), lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    adapter = LayerwiseLR(optimizer, Trust(), model)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    factors = adapter.get_last_factors()
    assert (factors["0.weight"] == 1) == (rate == 0)
    assert torch.equal(model[0].weight, before[0]) == (rate == 0)


def test_each_parameter_is_measured_at_the_rate_of_its_own_group() -> None:
    model = network()
    optimizer = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.5}, {"params": [model[0].bias], "lr": 0.1}])
    adapter = LayerwiseLR(optimizer, Trust(), model, layers="module", exclude=None)
    backward(model, 0)
    norm = float(torch.cat([p.detach().flatten() for p in model[0].parameters()]).norm())
    gradient = float(torch.cat([p.grad.flatten() for p in model[0].parameters()]).norm())
    optimizer.step()
    assert adapter.get_last_factors()["0"] == pytest.approx(norm / gradient, rel=1e-12)


def test_monitor_records_the_factors_of_the_step_itself() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = LayerwiseLR(optimizer, Trust(), model)
    memory = layerwise.sinks.Memory()
    layerwise.Monitor(optimizer, model, every=1, sinks=[memory])
    for step in range(3):
        backward(model, step)
        optimizer.step()
        record = memory.records[-1]
        assert list(record.factor) == pytest.approx(list(adapter.get_last_factors().values()), rel=1e-12)
        assert record.lr[0] * record.factor[0] != 0


def test_a_closure_gives_the_gradients_of_the_step() -> None:
    model, alike = network(), network()
    results = []
    for net, closed in ((model, True), (alike, False)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        LayerwiseLR(optimizer, Trust(), net)
        for step in range(5):
            if closed:
                optimizer.step(lambda net=net, step=step: backward(net, step))
            else:
                backward(net, step)
                optimizer.step()
        results.append([p.detach() for p in net.parameters()])
    assert all(map(torch.equal, *results))


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    model = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    adapter = LayerwiseLR(optimizer, Trust(calibrate=True), model)
    backward(model, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    before, state = [p.detach().clone() for p in model.parameters()], adapter.state_dict()["state"]
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert set(adapter.get_last_factors().values()) == {1.0}
    assert torch.equal(adapter.state_dict()["state"]["first_ratio"], state["first_ratio"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_is_that_of_float64_to_its_rounding(dtype: torch.dtype) -> None:
    """One step of SGD from the same numbers."""
    model, wide = network(dtype), network(dtype).double()
    for net in (model, wide):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        LayerwiseLR(optimizer, Trust(), net)
        generator = torch.Generator().manual_seed(1)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype)
        optimizer.step()
    for p, expected in zip(model.parameters(), wide.parameters(), strict=True):
        apart = (p.detach().double() - expected.detach()).abs().max()
        assert float(apart) <= 4 * torch.finfo(dtype).eps * float(expected.detach().abs().max())


def test_what_is_known_before_the_step_costs_no_copy() -> None:
    """Between two measurements AlignUpdates holds its factors, which scale what the step writes."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, AlignUpdates(every=3), model)
    copied = []
    for step in range(6):
        backward(model, step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        copied.append(adapter._attached._before is not None)
        factors = adapter.get_last_factors()
        change = (before[0] - model[0].weight.detach()) / (0.1 * model[0].weight.grad)
        torch.testing.assert_close(change, torch.full_like(change, factors["0.weight"]), rtol=1e-9, atol=0)
    assert factors["0.weight"] != 1


def test_a_step_that_fails_leaves_nothing_for_the_next() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LayerwiseLR(optimizer, AlignUpdates(every=2), model)
    backward(model, 0)
    model[3].bias.grad = torch.ones_like(model[3].bias).to_sparse()
    optimizer.param_groups[0]["weight_decay"] = 0.1  # which the step refuses with a sparse gradient
    with pytest.raises(RuntimeError):
        optimizer.step()
    for step in range(3):
        backward(model, step)
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert float((model[0].weight - before).detach().abs().max()) < 1


@pytest.mark.parametrize("first", [True, False])
def test_beside_another_adapter_it_is_refused_and_chained_they_multiply(first: bool) -> None:
    model, alike = network(), network()
    rules = [layerwise.rules.Constant({"0*": 3.0, "*": 1.0}), Trust()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LayerwiseLR(optimizer, rules[first], model, layers="parameter")
    hooks = len(optimizer._optimizer_step_pre_hooks)
    with pytest.raises(ValueError, match=r"attach chain\(…\) of both"):
        LayerwiseLR(optimizer, rules[not first], model, layers="parameter")
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    both, alone = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(alike.parameters(), lr=0.1)
    chained = LayerwiseLR(both, chain(*rules), model)
    trust = LayerwiseLR(alone, Trust(), alike)
    for net, each in ((model, both), (alike, alone)):
        backward(net, 0)
        each.step()
    own, only = chained.get_last_factors(), trust.get_last_factors()
    assert own["0.weight"] == pytest.approx(3 * only["0.weight"], rel=1e-12)
    assert own["3.weight"] == pytest.approx(only["3.weight"], rel=1e-12)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e6), (torch.float32, 1e9), (torch.bfloat16, 1e3)])
def test_a_huge_step_that_is_clipped_keeps_the_weights(dtype: torch.dtype, size: float) -> None:
    weight = nn.Parameter((0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).to(dtype))
    before = weight.detach().double().clone()
    optimizer = torch.optim.SGD([("weight", weight)], lr=0.1)
    LayerwiseLR(optimizer, UpdateClip(1.0))
    weight.grad = (size * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    gradient = weight.grad.double()
    optimizer.step()
    expected = before - 0.1 * gradient / gradient.square().mean().sqrt()
    assert float((weight.detach().double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps


def test_factors_beyond_half_precision_act_whole() -> None:
    weight = nn.Parameter(torch.full((64, 64), 100.0, dtype=torch.float16))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    LayerwiseLR(optimizer, Trust(), model)
    weight.grad = torch.full_like(weight, 0.0625)
    weight.data[0, 0] = 1e4
    optimizer.step()
    assert bool(torch.isfinite(weight).all())
