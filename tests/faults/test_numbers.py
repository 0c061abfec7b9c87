"""Numbers at the edge: gradients that are NaN, infinite, subnormal, zero or huge, in any layer at any step."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from exact import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import layerwise
from layerwise import reference
from layerwise.layers import Layer
from layerwise.rules import (
    LARC,
    LARS,
    AllLayers,
    BackMatching,
    Constant,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    LayerDecay,
    LayerFreezing,
    Phase,
    chain,
)
from layerwise.sums import LARGEST

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYERS = ["0", "2", "4"]
ALL_LAYERS = GradientAmplification(AllLayers(after_analysis=False), [Phase(9, True)])
RULES: dict[str, Any] = {
    "layer-adaptive": LayerAdaptive(),
    "LARS": LARS(),
    "LARC": LARC(),
    "LARC unclipped": LARC(clip=False),
    "chain": chain(LayerAdaptive(), LARS()),
    "constant": Constant({"0": 0.5, "4": 3.0}),
    "layer decay": LayerDecay(0.5),
    "back-matching": BackMatching(),
    "all layers": ALL_LAYERS,
    "directionality": GradientAmplification(Directionality(threshold=0.5, reselect=1), [Phase(9, True)]),
    "G prime": GradientAmplification(Directionality("G_prime", threshold=0.5, reselect=1), [Phase(9, True)]),
    "freezing": LayerFreezing(0.5, every=1),
}
READS_GRADIENTS = {"layer-adaptive", "LARS", "LARC", "LARC unclipped", "chain"}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=2.0**-6),
    "momentum": lambda p: torch.optim.SGD(p, lr=2.0**-6, momentum=0.875, weight_decay=2.0**-4),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=2.0**-6, momentum=0.875, weight_decay=2.0**-4, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2.0**-6),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=2.0**-6, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=2.0**-6, weight_decay=2.0**-4),
}
PLACES = ["auto", "gradient", "lr", "update"]
EDGES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-38, -1e-38]


@dataclass(frozen=True)
class Fault:
    """One kind of number in the gradient of one parameter at one step: in one entry, or in all."""

    step: int
    parameter: int
    value: float | str
    everywhere: bool

    def put_into(self, gradient: Tensor) -> None:
        info = torch.finfo(gradient.dtype)
        named = {"largest": info.max, "lowest": info.min, "tiny": info.tiny, "subnormal": info.smallest_normal / 4}
        number = named[self.value] if isinstance(self.value, str) else self.value
        value = torch.tensor(number, dtype=torch.float64).to(gradient.dtype)
        if self.everywhere:
            gradient.fill_(value)
        else:
            gradient.view(-1)[-1] = value


FAULTS = st.lists(
    st.builds(
        Fault,
        step=st.integers(0, 3),
        parameter=st.integers(0, 5),
        value=st.sampled_from([*EDGES, "largest", "lowest", "tiny", "subnormal"]),
        everywhere=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def network(dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def put_gradients(model: nn.Module, step: int, faults: list[Fault]) -> None:
    generator = torch.Generator().manual_seed(step)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for fault in faults:
            if (fault.step, fault.parameter) == (step, number):
                fault.put_into(p.grad)


def arrays(parameters: Any) -> list[np.ndarray]:
    return [p.detach().double().numpy() for p in parameters]


def expected_factors(name: str, optimizer: torch.optim.Optimizer, layers: list[Layer]) -> list[float]:
    """The factors of rules that read gradients, by the slow reference."""
    gradients = [arrays(p.grad for p in layer.parameters) for layer in layers]
    weights = [arrays(layer.parameters) for layer in layers]
    decays = [[optimizer.param_groups[0]["weight_decay"]] * len(layer.parameters) for layer in layers]
    with np.errstate(over="ignore", invalid="ignore"):
        lars = reference.lars(gradients, weights, decays)
        rates = [2.0**-6] * len(layers)
        found = {
            "layer-adaptive": lambda: reference.layer_adaptive(gradients),
            "LARS": lambda: lars,
            "LARC": lambda: reference.larc(gradients, weights, decays, rates),
            "LARC unclipped": lambda: reference.larc(gradients, weights, decays, rates, clip=False),
            "chain": lambda: reference.chain([reference.layer_adaptive(gradients), lars]),
        }[name]()
    return [float(f) if layer.included else 1.0 for f, layer in zip(found, layers, strict=True)]


def representable(tensors: list[Tensor]) -> bool:
    """Tell whether the sum of these squares is neither lost nor infinite in the type in which it is formed."""
    sizes = torch.cat([t.detach().double().abs().flatten() for t in tensors])
    smallest, largest = (1e-140, 1e140) if tensors[0].dtype is torch.float64 else (1e-15, 1e18)
    return bool(sizes.isfinite().all() and sizes.max() < largest and sizes.max() > smallest)


def check_steps(dtype: torch.dtype, rule: str, kind: str, place: str, faults: list[Fault]) -> None:
    """Step an attached optimizer beside the bare one, which before each step is given weights and state anew."""
    model, bare = network(dtype), network(dtype)
    optimizer, alone = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](bare.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, RULES[rule], model, apply=place)
    probe = layerwise.LayerwiseLR(alone, RULES[rule], bare, apply=place)
    probe.detach()
    layers, twins = adapter.layer_table(), probe.layer_table()
    for step in range(4):
        bare.load_state_dict(model.state_dict())
        alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each in (model, bare):
            put_gradients(each, step, faults)
        expected = expected_factors(rule, alone, twins) if rule in READS_GRADIENTS else [math.nan] * len(layers)
        known = [representable([p.grad for p in t.parameters]) and representable([*t.parameters]) for t in twins]
        optimizer.step()
        alone.step()
        factors = adapter.get_last_factors()
        assert all(map(math.isfinite, factors.values())), factors
        for layer, twin, foreseen, sound in zip(layers, twins, expected, known, strict=True):
            factor = factors[layer.name]
            gradients = [p.grad for p in twin.parameters]
            if rule in READS_GRADIENTS:
                if sound:
                    assert factor == pytest.approx(foreseen, rel=1e-5), layer.name
                elif not all(g.isfinite().all() for g in gradients) or not any(map(torch.any, gradients)):
                    assert factor == 1, layer.name
            if factor == 1:
                for p, q in zip(layer.parameters, twin.parameters, strict=True):
                    same_bits(p.detach(), q.detach())
                    same_bits(optimizer.state.get(p, {}), alone.state.get(q, {}))
        if step % 2:
            adapter.end_epoch()
    if name_of_rule(rule) in ("GradientAmplification", "LayerFreezing"):
        assert all(math.isnan(one.value) or 0 <= one.value <= 1 for one in adapter.get_last_selection().values())


def name_of_rule(rule: str) -> str:
    return type(RULES[rule]).__name__


every_case = given(
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(sorted(RULES)),
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    place=st.sampled_from(PLACES),
    faults=FAULTS,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@every_case
def test_a_layer_with_factor_one_does_what_the_optimizer_alone_would_do(dtype, rule, kind, place, faults):
    check_steps(dtype, rule, kind, place, faults)


@pytest.mark.faults
@settings(max_examples=5_000, deadline=None, print_blob=True)
@every_case
def test_a_layer_with_factor_one_does_what_the_optimizer_alone_would_do_5_000_cases(dtype, rule, kind, place, faults):
    check_steps(dtype, rule, kind, place, faults)


def check_sums(dtype: torch.dtype, measure: str, faults: list[Fault]) -> None:
    """Measure an epoch with such gradients, beside G and G′ of the stored gradients of the steps that count."""
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = GradientAmplification(Directionality(measure, threshold=0.5), [Phase(2, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    counted = []
    for step in range(4):
        put_gradients(model, step, faults)
        layers = [arrays(p.grad for p in layer.parameters) for layer in adapter.layer_table()]
        with np.errstate(over="ignore"):
            size = sum(float(np.abs(array).sum()) for layer in layers for array in layer)
        if 0 < size < LARGEST:
            counted.append(layers)
        optimizer.step()
    adapter.end_epoch()
    selection = adapter.get_last_selection().values()
    if counted:
        expected = reference.directionality(counted, measure)
        assert [one.value for one in selection] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
        assert all(math.isfinite(one.z) for one in selection)
    else:
        assert all(math.isnan(one.value) for one in selection)


every_epoch = given(dtype=st.sampled_from(DTYPES), measure=st.sampled_from(["G", "G_prime"]), faults=FAULTS)


@settings(max_examples=100, deadline=None, derandomize=True)
@every_epoch
def test_steps_that_are_not_finite_or_huge_leave_the_sums_of_an_epoch_alone(dtype, measure, faults):
    check_sums(dtype, measure, faults)


@pytest.mark.faults
@settings(max_examples=3_000, deadline=None, print_blob=True)
@every_epoch
def test_steps_that_are_not_finite_or_huge_leave_the_sums_of_an_epoch_alone_3_000_cases(dtype, measure, faults):
    check_sums(dtype, measure, faults)


def check_raising(dtype: torch.dtype, rule: str, kind: str, place: str, faults: list[Fault]) -> None:
    """Step where the gradients are finite, meet an error where not; in the end all is as if those had not been."""
    model, other = network(dtype), network(dtype)
    optimizer, alone = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](other.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, RULES[rule], model, apply=place, on_nonfinite="raise")
    twin = layerwise.LayerwiseLR(alone, RULES[rule], other, apply=place)
    taken = 0

    def everything() -> Any:
        gradients = [p.grad for p in model.parameters()]
        return copy.deepcopy([model.state_dict(), optimizer.state_dict(), adapter.state_dict(), gradients])

    for step in range(4):
        for each in (model, other):
            put_gradients(each, step, faults)
        broken = [n for n in LAYERS if not all(p.grad.isfinite().all() for p in model.get_submodule(n).parameters())]
        if not broken:
            optimizer.step()
            alone.step()
            taken += 1
            continue
        before, factors = everything(), adapter.get_last_factors()
        with pytest.raises(FloatingPointError, match=f"step {taken + 1}: the gradient of layer.* not finite") as caught:
            optimizer.step()
        assert all((f"'{n}" in str(caught.value)) == (n in broken) for n in LAYERS)
        same_bits(everything(), before)
        assert adapter.get_last_factors() == factors
    same_bits(dict(model.named_parameters()), dict(other.named_parameters()))
    same_bits(optimizer.state_dict()["state"], alone.state_dict()["state"])
    same_bits(adapter.state_dict(), twin.state_dict())


@settings(max_examples=100, deadline=None, derandomize=True)
@every_case
def test_an_adapter_asked_to_raise_does_so_before_anything_changes(dtype, rule, kind, place, faults):
    check_raising(dtype, rule, kind, place, faults)


@pytest.mark.faults
@settings(max_examples=3_000, deadline=None, print_blob=True)
@every_case
def test_an_adapter_asked_to_raise_does_so_before_anything_changes_3_000_cases(dtype, rule, kind, place, faults):
    check_raising(dtype, rule, kind, place, faults)


def test_steps_that_a_gradient_scaler_skips_do_not_raise():
    model = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(torch.full((2, 5), math.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2
    same_bits(model.state_dict(), before)
    optimizer.zero_grad()
    model(torch.full((2, 5), math.inf)).sum().backward()
    with pytest.raises(FloatingPointError, match="step 2: the gradient of layers '0', '2', '4' is not finite"):
        optimizer.step()


def test_what_to_do_is_one_of_two_words():
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="on_nonfinite='stop' is unknown; allowed: 'ignore', 'raise'"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="stop")
    assert not optimizer._optimizer_step_pre_hooks
