"""Caffe's solvers beside loops over the elements, beside torch's optimizers, and under the adapter."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise import LayerwiseLR
from layerwise.lab.errors import UsageError
from layerwise.lab.models.lenet import LeNet
from layerwise.lab.training import caffe
from layerwise.rules import Constant, LayerAdaptive

MU, DECAY, STEPS = 0.9, 0.03, 50
MULTIPLIERS = {"a.bias": (2.0, 1.0), "b.bias": (2.0, 1.0), "c.weight": (1.0, 250.0), "c.bias": (2.0, 0.0)}
SOLVERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda params, lr, **options: caffe.SGD(params, lr, momentum=MU, **options),
    "SGD without momentum": lambda params, lr, **options: caffe.SGD(params, lr, **options),
    "Nesterov": lambda params, lr, **options: caffe.Nesterov(params, lr, momentum=MU, **options),
    "Nesterov without momentum": lambda params, lr, **options: caffe.Nesterov(params, lr, **options),
    "AdaGrad": lambda params, lr, **options: caffe.AdaGrad(params, lr, **options),
    "AdaDelta": lambda params, lr, **options: caffe.AdaDelta(params, lr, momentum=MU, **options),
}


def network(dtype: torch.dtype = torch.float64) -> nn.ModuleDict:
    """Three layers of a weight and a bias each, the same ones at each call."""
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "c": nn.Linear(5, 2)}).to(dtype)
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=dtype)
    return model


def gradient(w: np.ndarray, number: int, step: int) -> np.ndarray:
    """A gradient that depends on the weight and on the step, of another size for each parameter; some zeros.

    None is so large that the steps would be unstable and make much of each rounding error.
    """
    values = 4.0 ** (number - 5) * (np.sin(w) + np.cos(step + np.arange(w.size)).reshape(w.shape))
    values.flat[0] = 0.0
    return values


def put_gradients(model: nn.Module, step: int) -> None:
    for number, p in enumerate(model.parameters()):
        p.grad = torch.from_numpy(gradient(p.detach().double().numpy(), number, step)).to(p.dtype)


def falling(step: int) -> float:
    """A rate that falls a little at each step and ten-fold in the middle."""
    return 0.02 * (1 + 0.05 * step) ** -0.75 * (0.1 if step >= 25 else 1.0)


def constant(step: int) -> float:
    return 0.02


def train(model: nn.Module, optimizer: Any, rate: Callable[[int], float], steps: int = STEPS, first: int = 0) -> None:
    for step in range(first, first + steps):
        put_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# --- Element by element -----------------------------------------------------------------------------------------------


def sgd(w: float, d: float, local: float, h: list[float], mu: float) -> float:
    h[0] = mu * h[0] + local * d
    return w - h[0]


def nesterov(w: float, d: float, local: float, h: list[float], mu: float) -> float:
    before = h[0]
    h[0] = mu * before + local * d
    return w - ((1 + mu) * h[0] - mu * before)


def adagrad(w: float, d: float, local: float, h: list[float], mu: float) -> float:
    h[0] = h[0] + d**2
    return w - local * d / (math.sqrt(h[0]) + 1e-8)


def adadelta(w: float, d: float, local: float, h: list[float], mu: float) -> float:
    h[0] = mu * h[0] + (1 - mu) * d**2
    u = d * math.sqrt((h[1] + 1e-6) / (h[0] + 1e-6))
    h[1] = mu * h[1] + (1 - mu) * u**2
    return w - local * u


FORMULAS = {
    "SGD": (sgd, MU),
    "SGD without momentum": (sgd, 0.0),
    "Nesterov": (nesterov, MU),
    "Nesterov without momentum": (nesterov, 0.0),
    "AdaGrad": (adagrad, 0.0),
    "AdaDelta": (adadelta, MU),
}


@pytest.mark.parametrize("multipliers", [{}, MULTIPLIERS], ids=["no multipliers", "multipliers"])
@pytest.mark.parametrize("decay", [0.0, DECAY], ids=["no decay", "decay"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_weights_are_those_of_the_formula_while_the_rate_falls(name, decay, multipliers):
    model = network()
    optimizer = SOLVERS[name](caffe.parameter_groups(model, multipliers), 1.0, weight_decay=decay)
    formula, mu = FORMULAS[name]
    expected = [w.numpy() for w in weights(model)]
    history = [[[0.0, 0.0] for _ in range(w.size)] for w in expected]
    pairs = [multipliers.get(key, (1.0, 1.0)) for key, _ in model.named_parameters()]
    for step in range(STEPS):
        train(model, optimizer, falling, steps=1, first=step)
        for number, (w, (lr_mult, decay_mult)) in enumerate(zip(expected, pairs, strict=True)):
            g = gradient(w, number, step)
            for i in range(w.size):
                d = g.flat[i] + decay * decay_mult * w.flat[i]
                w.flat[i] = formula(w.flat[i], d, falling(step) * lr_mult, history[number][i], mu)
        for p, w in zip(model.parameters(), expected, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-12, err_msg=f"step {step}")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_formulas_by_hand():
    def run(solver: Any, w: nn.Parameter, gradients: list[float], rates: list[float]) -> list[float]:
        seen = []
        for g, rate in zip(gradients, rates, strict=True):
            w.grad = torch.tensor([g], dtype=torch.float64)
            solver.param_groups[0]["lr"] = rate
            solver.step()
            seen.append(w.item())
        return seen

    def one() -> nn.Parameter:
        return nn.Parameter(torch.ones(1, dtype=torch.float64))

    # d = 2 + 0.1 = 2.1, h = 0.63; d = 0.037, h = 0.315 + 0.0074
    w = one()
    assert run(caffe.SGD([w], 1.0, momentum=0.5, weight_decay=0.1), w, [2, 0], [0.3, 0.2]) == pytest.approx(
        [0.37, 0.0476], rel=1e-14
    )
    # h = 0.2, update 0.3; h = 0.1 + 0.2, update 0.45 - 0.1
    w = one()
    assert run(caffe.Nesterov([w], 1.0, momentum=0.5), w, [2, 1], [0.1, 0.2]) == pytest.approx([0.7, 0.35], rel=1e-14)
    # h = 9, then 25; delta 1 is outside of the root
    w = one()
    assert run(caffe.AdaGrad([w], 1.0, delta=1.0), w, [3, 4], [0.4, 0.3]) == pytest.approx([0.7, 0.5], rel=1e-14)
    # h = 0.5 * 4 = 2, u = 2 sqrt(1 / 3), inside of the root
    w = one()
    assert run(caffe.AdaDelta([w], 1.0, momentum=0.5, delta=1.0), w, [2], [0.1]) == pytest.approx(
        [1 - 0.2 / math.sqrt(3)], rel=1e-14
    )


# --- Beside torch's optimizers ----------------------------------------------------------------------------------------

TORCHS = {
    "SGD": lambda params, decay: torch.optim.SGD(params, momentum=MU, weight_decay=decay),
    "SGD without momentum": lambda params, decay: torch.optim.SGD(params, weight_decay=decay),
    "Nesterov": lambda params, decay: torch.optim.SGD(params, momentum=MU, weight_decay=decay, nesterov=True),
    "AdaGrad": lambda params, decay: torch.optim.Adagrad(params, weight_decay=decay, eps=1e-8),
    "AdaDelta": lambda params, decay: torch.optim.Adadelta(params, rho=MU, weight_decay=decay, eps=1e-6),
}


def distance_to_torch(name: str, rate: Callable[[int], float], decay: float) -> float:
    mine, theirs = network(), network()
    train(mine, SOLVERS[name](mine.parameters(), 1.0, weight_decay=decay), rate)
    train(theirs, TORCHS[name](theirs.parameters(), decay), rate)
    return max(float((a - b).abs().max()) for a, b in zip(weights(mine), weights(theirs), strict=True))


@pytest.mark.parametrize("decay", [0.0, DECAY], ids=["no decay", "decay"])
@pytest.mark.parametrize("name", TORCHS)
def test_at_a_constant_rate_the_weights_are_torchs(name, decay):
    assert distance_to_torch(name, constant, decay) < 1e-12


@pytest.mark.parametrize("name", ["SGD without momentum", "AdaGrad", "AdaDelta"])
def test_where_no_rate_is_in_the_history_the_weights_are_torchs_at_any_rate(name):
    assert distance_to_torch(name, falling, DECAY) < 1e-12


@pytest.mark.parametrize("name", ["SGD", "Nesterov"])
def test_where_the_rate_is_in_the_history_a_falling_rate_tells_caffe_from_torch(name):
    assert distance_to_torch(name, falling, DECAY) > 1e-3


@pytest.mark.parametrize("solver", [caffe.SGD, caffe.Nesterov])
def test_the_history_keeps_the_rate_of_its_own_iteration(solver):
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = solver([{"params": [w], "lr_mult": 2.0}], 0.1, momentum=0.5)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert optimizer.state[w]["history"].item() == pytest.approx(0.2, rel=1e-15)
    optimizer.param_groups[0].update(lr=0.001, lr_mult=1.0)
    w.grad.zero_()
    optimizer.step()
    assert optimizer.state[w]["history"].item() == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("solver", [caffe.SGD, caffe.Nesterov])
def test_without_momentum_no_history_is_kept(solver):
    model = network()
    optimizer = solver(model.parameters(), 0.1, weight_decay=DECAY)
    train(model, optimizer, constant, steps=1)
    assert not optimizer.state


# --- The adapter ------------------------------------------------------------------------------------------------------


def hand_written(solver: str, w: torch.Tensor, g: torch.Tensor, local: float, state: dict[str, torch.Tensor]) -> None:
    """One parameter's step with decay and with the local rate given, in plain operations of PyTorch."""
    d = torch.add(g, w, alpha=DECAY)
    h = state.get("h", torch.zeros_like(w))
    if solver in ("SGD", "Nesterov"):
        state["h"] = torch.add(MU * h, d, alpha=local)
        if solver == "SGD":
            w -= state["h"]
        else:
            w.copy_(torch.add(torch.add(w, state["h"], alpha=-MU), d, alpha=-local))
    elif solver == "AdaGrad":
        state["h"] = torch.addcmul(h, d, d)
        w.copy_(torch.addcdiv(w, d, torch.sqrt(state["h"]) + 1e-8, value=-local))
    else:
        h2 = state.get("h2", torch.zeros_like(w))
        state["h"] = torch.addcmul(MU * h, d, d, value=1 - MU)
        u = torch.sqrt((h2 + 1e-6) / (state["h"] + 1e-6)) * d
        state["h2"] = torch.addcmul(MU * h2, u, u, value=1 - MU)
        w.copy_(torch.add(w, u, alpha=-local))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", ["SGD", "Nesterov", "AdaGrad", "AdaDelta"])
def test_the_adapters_factor_is_caffes_local_rate_to_the_bit(solver, dtype):
    model = network(dtype)
    biases = {name: (2.0, 1.0) for name, _ in model.named_parameters() if name.endswith("bias")}
    optimizer = SOLVERS[solver](caffe.parameter_groups(model, biases), 1.0, weight_decay=DECAY)
    adapter = LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in expected}
    for step in range(12):
        train(model, optimizer, falling, steps=1, first=step)
        factors = adapter.get_last_factors()
        assert len(set(factors.values())) == 3
        for name, p in model.named_parameters():
            layer, _, kind = name.partition(".")
            norm = math.hypot(*(x for q in model[layer].parameters() for x in q.grad.double().flatten().tolist()))
            assert factors[layer] == pytest.approx(1 + math.log(1 + 1 / norm), rel=1e-6)
            local = (falling(step) * factors[layer]) * (2.0 if kind == "bias" else 1.0)
            hand_written(solver, expected[name], p.grad, local, states[name])
            assert torch.equal(p.detach(), expected[name]), f"{name} after step {step}"
            assert torch.equal(optimizer.state[p]["history"], states[name]["h"])
        assert adapter.get_last_lr() == {layer: falling(step) * factor for layer, factor in factors.items()}
    assert [(group["lr"], group["lr_mult"]) for group in optimizer.param_groups] == [
        (falling(11), 1.0),
        (falling(11), 2.0),
    ]


@pytest.mark.parametrize("solver", ["SGD", "Nesterov"])
def test_the_adapter_finds_the_lr_place_by_itself_and_its_factor_stays_in_the_history(solver):
    model, scaled = network(), network()
    optimizer = SOLVERS[solver](model.parameters(), 1.0, weight_decay=DECAY)
    rule = Constant({"a": 0.5, "b": 4.0, "c": 0.125})
    assert LayerwiseLR(optimizer, rule, model).apply == "lr"
    gradients = SOLVERS[solver](scaled.parameters(), 1.0, weight_decay=DECAY)
    LayerwiseLR(gradients, rule, scaled, apply="gradient", decay="scaled")
    train(model, optimizer, falling)
    train(scaled, gradients, falling)
    torch.testing.assert_close(weights(model), weights(scaled), rtol=1e-12, atol=1e-12)


def test_an_attached_closure_is_evaluated_once_and_detaching_gives_the_bare_solver():
    model, bare = network(), network()
    optimizer = SOLVERS["SGD"](model.parameters(), 0.02)
    adapter = LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")
    calls = []

    def closure() -> float:
        calls.append(1)
        put_gradients(model, 0)
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert len(calls) == 1
    assert set(adapter.get_last_factors().values()) != {1.0}
    adapter.detach()
    model.load_state_dict(bare.state_dict())
    optimizer.state.clear()
    train(model, optimizer, constant, steps=3)
    train(bare, SOLVERS["SGD"](bare.parameters(), 0.02), constant, steps=3)
    assert all(map(torch.equal, weights(model), weights(bare)))


# --- What any optimizer of PyTorch does -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_leaves_gradients_as_they_are_and_parameters_without_one_alone(name):
    model = network()
    optimizer = SOLVERS[name](model.parameters(), 0.1, weight_decay=DECAY)
    put_gradients(model, 0)
    model["b"].weight.grad = None
    before = weights(model)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, w, g in zip(model.parameters(), before, gradients, strict=True):
        if g is None:
            assert p.grad is None
            assert torch.equal(p, w)
            assert p not in optimizer.state
        else:
            assert torch.equal(p.grad, g)
            assert not torch.equal(p, w)


def test_a_step_evaluates_its_closure_with_gradients_and_returns_the_loss():
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = caffe.SGD([w], 0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert w.item() == pytest.approx(2.4)
    assert optimizer.step() is None


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_resumed_from_a_file_has_the_same_bits(name):
    def build() -> tuple[nn.Module, Any]:
        model = network()
        return model, SOLVERS[name](caffe.parameter_groups(model, MULTIPLIERS), 1.0, weight_decay=DECAY)

    whole, optimizer = build()
    train(whole, optimizer, falling, steps=10)

    first, optimizer = build()
    train(first, optimizer, falling, steps=5)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)

    second = network()
    resumed = SOLVERS[name](caffe.parameter_groups(second, MULTIPLIERS), 0.5)
    second.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    assert resumed.param_groups[0]["weight_decay"] == DECAY
    assert [g["decay_mult"] for g in resumed.param_groups] == [1.0, 1.0, 250.0, 0.0]
    train(second, resumed, falling, steps=5, first=5)
    assert all(map(torch.equal, weights(second), weights(whole)))


def test_a_copy_steps_alone():
    model = network()
    optimizer = SOLVERS["AdaGrad"](model.parameters(), 0.1)
    train(model, optimizer, constant, steps=2)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    before = weights(model)
    train(other, other_optimizer, constant, steps=1, first=2)
    assert all(map(torch.equal, weights(model), before))
    train(model, optimizer, constant, steps=1, first=2)
    assert all(map(torch.equal, weights(model), weights(other)))


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda w: caffe.Nesterov([w], 0.1, momentum=1.0), r"Nesterov: momentum=1\.0: use a number from 0 to below 1"),
        (lambda w: caffe.AdaGrad([w], 0.1, delta=0.0), r"AdaGrad: delta=0\.0: use a finite number above 0"),
        (lambda w: caffe.AdaDelta([w], 1.0, momentum=-0.1), r"AdaDelta: momentum=-0\.1: use a number from 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(build, text):
    with pytest.raises(UsageError, match=text):
        build(torch.ones(2))


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_groups_hold_equal_multipliers_in_the_order_of_the_network():
    groups = caffe.parameter_groups(network(), MULTIPLIERS)
    assert [([name for name, _ in group["params"]], group["lr_mult"], group["decay_mult"]) for group in groups] == [
        (["a.weight", "b.weight"], 1.0, 1.0),
        (["a.bias", "b.bias"], 2.0, 1.0),
        (["c.weight"], 1.0, 250.0),
        (["c.bias"], 2.0, 0.0),
    ]


def test_without_multipliers_there_is_one_group():
    model = LeNet(0)
    (group,) = caffe.parameter_groups(model, {})
    assert [name for name, _ in group["params"]] == [name for name, _ in model.named_parameters()]
    assert (group["lr_mult"], group["decay_mult"]) == (1.0, 1.0)


def test_a_solver_keeps_the_names():
    optimizer = caffe.SGD(caffe.parameter_groups(network(), MULTIPLIERS), 0.1, momentum=MU)
    assert optimizer.param_groups[1]["param_names"] == ["a.bias", "b.bias"]
