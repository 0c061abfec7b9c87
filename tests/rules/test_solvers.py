"""The adapter on torch's optimizers, step by step beside the reference solvers in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import nn

import reference
from layerwise import LayerwiseLR
from layerwise.rules import LARS, Constant, LayerAdaptive

STEPS = 25
RATE, MOMENTUM, DECAY = 0.02, 0.9, 0.03
SHAPES = [(4, 3), (4,), (5, 4), (5,), (2, 5), (2,)]
LAYER_OF = [0, 0, 1, 1, 2, 2]
FACTORS = {"a": 0.5, "b": 2.0, "c": 0.125}
Factors = Callable[[list[np.ndarray], list[np.ndarray]], np.ndarray]


class Solver(Protocol):
    weights: list[np.ndarray]

    def step(self, gradients: Any, rate: float, factors: Any) -> None: ...


def network() -> nn.ModuleDict:
    """Three layers of a weight and a bias each, the same ones at each call."""
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "c": nn.Linear(5, 2)}).double()
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def gradients_at(weights: list[np.ndarray], step: int) -> list[np.ndarray]:
    """Gradients of a different size in each layer, that depend on the weights and on the step."""
    sizes = [10.0 ** (LAYER_OF[i] - 2) for i in range(len(weights))]
    return [
        size * (np.sin(w) + np.cos(step + np.arange(w.size).reshape(w.shape)))
        for size, w in zip(sizes, weights, strict=True)
    ]


def by_layer(arrays: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [[array for array, owner in zip(arrays, LAYER_OF, strict=True) if owner == layer] for layer in range(3)]


def adaptive(weights: list[np.ndarray], gradients: list[np.ndarray]) -> np.ndarray:
    return reference.layer_adaptive(by_layer(gradients))


def fixed(weights: list[np.ndarray], gradients: list[np.ndarray]) -> np.ndarray:
    return reference.constant(list("abc"), FACTORS)


def start() -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in network().parameters()]


def assert_same_weights(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    solver: Solver,
    factors: Factors = adaptive,
    rate: Callable[[int], float] = lambda step: RATE,
) -> None:
    """Step both, each on the gradients at its own weights, and compare the weights after each step."""
    for step in range(STEPS):
        mine = gradients_at(solver.weights, step)
        solver.step(mine, rate(step), factors(solver.weights, mine))
        theirs = gradients_at([p.detach().numpy() for p in model.parameters()], step)
        for p, gradient in zip(model.parameters(), theirs, strict=True):
            p.grad = torch.from_numpy(gradient)
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group.get("multiplier", 1.0)
        optimizer.step()
        for w, p in zip(solver.weights, model.parameters(), strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11, atol=1e-11, err_msg=f"after step {step + 1}")


def caffe_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases at twice the rate and without decay, the last weight with ten times the decay."""
    weights = [p for p in model.parameters() if p.ndim == 2]
    return [
        {"params": weights[:2], "weight_decay": DECAY},
        {"params": weights[2:], "weight_decay": 10 * DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "multiplier": 2.0},
    ]


MULTIPLIERS: dict[str, Any] = {
    "rate_multipliers": [1, 2, 1, 2, 1, 2],
    "decay_multipliers": [1, 0, 1, 0, 10, 0],
}


# --- Singh et al. 2015 on Caffe's solvers: the local rate, with the factor, inside the history ------------------------


@pytest.mark.parametrize("place", ["auto", "gradient"])
@pytest.mark.parametrize("decay", [0.0, DECAY], ids=["no_decay", "decay"])
def test_sgd_with_momentum_is_caffes_at_a_constant_rate(place: Any, decay: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=MOMENTUM, weight_decay=decay)
    adapter = LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
    assert adapter.apply == "gradient"
    solver = reference.CaffeSGD(start(), LAYER_OF, momentum=MOMENTUM, weight_decay=decay)
    assert_same_weights(model, optimizer, solver)


@pytest.mark.parametrize("place", ["auto", "gradient"])
def test_nesterov_is_caffes_at_a_constant_rate(place: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
    solver = reference.CaffeNesterov(start(), LAYER_OF, momentum=MOMENTUM, weight_decay=DECAY)
    assert_same_weights(model, optimizer, solver)


@pytest.mark.parametrize("decay", [0.0, DECAY], ids=["no_decay", "decay"])
def test_adagrad_is_equation_12_and_its_sum_of_squares_knows_no_factor(decay: float) -> None:
    model = network()
    optimizer = torch.optim.Adagrad(model.parameters(), weight_decay=decay, eps=1e-8)
    assert LayerwiseLR(optimizer, LayerAdaptive(), model).apply == "lr"
    solver = reference.CaffeAdaGrad(start(), LAYER_OF, weight_decay=decay)
    assert_same_weights(model, optimizer, solver)
    for p, history in zip(model.parameters(), solver.history, strict=True):
        np.testing.assert_allclose(optimizer.state[p]["sum"].numpy(), history, rtol=1e-10)


@pytest.mark.parametrize("nesterov", [False, True], ids=["sgd", "nesterov"])
def test_multipliers_of_rate_and_decay_are_caffes(nesterov: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(caffe_groups(model), momentum=MOMENTUM, nesterov=nesterov)
    LayerwiseLR(optimizer, LayerAdaptive(), model)
    kind = reference.CaffeNesterov if nesterov else reference.CaffeSGD
    solver = kind(start(), LAYER_OF, momentum=MOMENTUM, weight_decay=DECAY, **MULTIPLIERS)
    assert_same_weights(model, optimizer, solver)


def test_adagrad_multipliers_of_rate_and_decay_are_caffes() -> None:
    model = network()
    optimizer = torch.optim.Adagrad(caffe_groups(model), eps=1e-8)
    LayerwiseLR(optimizer, LayerAdaptive(), model)
    solver = reference.CaffeAdaGrad(start(), LAYER_OF, weight_decay=DECAY, **MULTIPLIERS)
    assert_same_weights(model, optimizer, solver)


def test_sgd_without_momentum_is_caffes_at_any_rate() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), weight_decay=DECAY)
    LayerwiseLR(optimizer, LayerAdaptive(), model)
    solver = reference.CaffeSGD(start(), LAYER_OF, weight_decay=DECAY)
    assert_same_weights(model, optimizer, solver, rate=inv_policy)


# --- torch's own forms ------------------------------------------------------------------------------------------------


def inv_policy(step: int) -> float:
    return RATE * (1 + 0.1 * step) ** -0.75


@pytest.mark.parametrize("factors", [adaptive, fixed], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["sgd", "nesterov"])
@pytest.mark.parametrize(
    ("place", "decay"),
    [("gradient", "scaled"), ("gradient", "plain"), ("auto", "scaled"), ("auto", "plain"), ("lr", "scaled")],
)
def test_sgd_is_torchs_form_while_the_rate_falls(factors: Factors, nesterov: bool, place: Any, decay: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=MOMENTUM, weight_decay=DECAY, nesterov=nesterov)
    rule = LayerAdaptive() if factors is adaptive else Constant(FACTORS)
    acting = LayerwiseLR(optimizer, rule, model, apply=place, decay=decay).apply
    solver = reference.TorchSGD(
        start(),
        LAYER_OF,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        nesterov=nesterov,
        place="lr" if acting == "lr" else "gradient",
        decay=decay,
    )
    assert_same_weights(model, optimizer, solver, factors, inv_policy)


def test_update_place_is_the_rate_where_the_step_is_proportional_to_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=MOMENTUM, weight_decay=DECAY)
    LayerwiseLR(optimizer, LayerAdaptive(), model, apply="update")
    solver = reference.TorchSGD(start(), LAYER_OF, momentum=MOMENTUM, weight_decay=DECAY, place="lr")
    assert_same_weights(model, optimizer, solver, rate=inv_policy)


@pytest.mark.parametrize("factors", [adaptive, fixed], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("place", ["auto", "lr", "update"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_adam_takes_the_factor_on_the_rate(factors: Factors, place: Any, decoupled: bool) -> None:
    model = network()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(model.parameters(), weight_decay=DECAY)
    rule = LayerAdaptive() if factors is adaptive else Constant(FACTORS)
    LayerwiseLR(optimizer, rule, model, apply=place)
    solver = reference.Adam(start(), LAYER_OF, weight_decay=DECAY, decoupled=decoupled)
    assert_same_weights(model, optimizer, solver, factors, inv_policy)


def test_lars_is_algorithm_1_of_its_paper() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=MOMENTUM, weight_decay=DECAY)
    LayerwiseLR(optimizer, LARS(trust_coefficient=0.1), model)
    solver = reference.TorchSGD(start(), range(6), momentum=MOMENTUM, weight_decay=DECAY)

    def factors(weights: list[np.ndarray], gradients: list[np.ndarray]) -> np.ndarray:
        ratios = reference.lars([[g] for g in gradients], [[w] for w in weights], [[DECAY]] * 6, trust_coefficient=0.1)
        return np.array([1.0 if w.ndim == 1 else f for w, f in zip(weights, ratios, strict=True)])

    assert_same_weights(model, optimizer, solver, factors, lambda step: 10 * inv_policy(step))


# --- The reference itself ---------------------------------------------------------------------------------------------


def single(kind: Any, **options: Any) -> Any:
    return kind([np.array([1.0])], [0], **options)


def test_caffe_sgd_by_hand() -> None:
    solver = single(reference.CaffeSGD, momentum=0.5, weight_decay=0.1)
    solver.step([np.array([2.0])], 0.1, [3.0])  # h = 0.3 * 2.1 = 0.63
    assert solver.weights[0] == pytest.approx(0.37)
    solver.step([np.array([0.0])], 0.2, [1.0])  # h = 0.315 + 0.2 * 0.037 = 0.3224
    assert solver.weights[0] == pytest.approx(0.0476)


def test_caffe_nesterov_by_hand() -> None:
    solver = single(reference.CaffeNesterov, momentum=0.5)
    solver.step([np.array([2.0])], 0.1, [1.0])  # h = 0.2, update 1.5 * 0.2
    assert solver.weights[0] == pytest.approx(0.7)
    solver.step([np.array([1.0])], 0.1, [2.0])  # h = 0.1 + 0.2 = 0.3, update 1.5 * 0.3 - 0.5 * 0.2
    assert solver.weights[0] == pytest.approx(0.35)


def test_caffe_adagrad_by_hand() -> None:
    solver = single(reference.CaffeAdaGrad)
    solver.step([np.array([3.0])], 0.1, [2.0])  # h = 9
    assert solver.weights[0] == pytest.approx(0.8)
    solver.step([np.array([4.0])], 0.1, [1.0])  # h = 25
    assert solver.weights[0] == pytest.approx(0.72)


def test_caffe_adagrad_takes_no_momentum() -> None:
    with pytest.raises(ValueError, match=r"momentum=0\.9: Caffe's AdaGrad takes none, it must be 0"):
        single(reference.CaffeAdaGrad, momentum=0.9).step([np.array([1.0])], 0.1, [1.0])


def test_only_a_change_of_rate_separates_caffes_history_from_torchs() -> None:
    caffe, torchs = single(reference.CaffeSGD, momentum=0.5), single(reference.TorchSGD, momentum=0.5)
    for solver in (caffe, torchs):
        solver.step([np.array([2.0])], 0.1, [1.0])
    assert caffe.weights[0] == torchs.weights[0] == pytest.approx(0.8)
    for solver in (caffe, torchs):
        solver.step([np.array([0.0])], 0.01, [1.0])
    assert caffe.weights[0] == pytest.approx(0.7)  # the old 0.2 of history, halved
    assert torchs.weights[0] == pytest.approx(0.79)  # halved, and at a tenth of its rate
