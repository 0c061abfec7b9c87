"""The numbers of stepping in backward: those of the optimizer alone, or of `LayerwiseLR`, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint

import layerwise
from layerwise import adapter as attaching
from layerwise.rules import (
    LARC,
    LARS,
    AllLayers,
    Constant,
    ElementwiseRule,
    GradientAmplification,
    LayerAdaptive,
    LayerDecay,
    Phase,
    RandomLayers,
    Rule,
    bounds,
    chain,
)
from optimizer_cases import CASES, Case, network

ALLOWED = (optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW)
RULES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "LayerAdaptive": LayerAdaptive,
    "LARS": LARS,
    "LARC": LARC,
    "Constant": lambda: Constant({"first": 0.0, "*": 0.3}),
    "LayerDecay": lambda: LayerDecay(0.7),
    "bounds": lambda: bounds(LayerAdaptive(), 0.5, 1.5),
    "chain": lambda: chain(LayerAdaptive(), LayerDecay(0.7), bounds(LARC(), 0.1, 2.0)),
    "amplification": lambda: GradientAmplification(
        RandomLayers(0.5, redraw="epoch"), [Phase(1, False), Phase(9, True)]
    ),
    "amplification_and_constant": lambda: chain(
        GradientAmplification(AllLayers(after_analysis=False), [Phase(2, True)]), Constant({"second": 0.5})
    ),
    "amplification_and_adaptive": lambda: chain(
        GradientAmplification(AllLayers(after_analysis=False), [Phase(2, True)]), LayerAdaptive()
    ),
}


def attached(in_backward: bool, optimizer: optim.Optimizer, model: nn.Module | None, rule: Any) -> Any:
    """Attach a step in backward, or the adapter that it is compared with."""
    if in_backward:
        return layerwise.step_in_backward(optimizer, model, rule)
    return None if rule is None else layerwise.LayerwiseLR(optimizer, rule, model)


def everything(model: nn.Module, optimizer: optim.Optimizer, handle: Any) -> list[Any]:
    """Return the weights, the optimizer state, and the last factors and rates."""
    last = [] if handle is None or handle.rule is None else [handle.get_last_factors(), handle.get_last_lr()]
    return [[p.detach().clone() for p in model.parameters()], optimizer.state_dict()["state"], *last]


def assert_same(train: Callable[[bool], list[Any]]) -> None:
    """Train with the ordinary step and in backward, and compare to the bit."""
    torch.testing.assert_close(train(True), train(False), rtol=0, atol=0, equal_nan=True)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(case, rule, id=f"{case}-{rule}")
        for case in CASES
        for rule in RULES
        if case.optimizer in ALLOWED and (not case.form or rule in ("none", "LayerAdaptive"))
    ],
)
def test_weights_state_and_factors_equal_the_ordinary_step_to_the_bit(case: Case, rule: str) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = network(case, torch.float32 if "amsgrad" in case.options else torch.float64)
        optimizer = case.make(model.parameters())
        handle = attached(in_backward, optimizer, model, RULES[rule]())
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(5):
            optimizer.zero_grad()
            model.loss(step).backward()
            assert not in_backward or all(p.grad is None for p in model.parameters())
            optimizer.step()
            scheduler.step()
            if step % 2 and handle is not None:
                handle.end_epoch()
        return everything(model, optimizer, handle)

    assert_same(train)


def test_equation_9_of_singh_inside_caffes_momentum_by_hand(make_model) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    by_hand = make_model()
    history = {p: torch.zeros_like(p) for p in by_hand.parameters()}
    for step in range(6):
        inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(inputs).square().sum().backward()
        optimizer.step()
        gradients = iter(torch.autograd.grad(by_hand(inputs).square().sum(), list(by_hand.parameters())))
        for layer in (by_hand[0], by_hand[2], by_hand[4]):
            pairs = [(p, next(gradients)) for p in (layer.weight, layer.bias)]
            norm = math.sqrt(sum(float((g**2).sum()) for _, g in pairs))
            for p, g in pairs:
                history[p] = 0.9 * history[p] + (1 + math.log(1 + 1 / norm)) * (g + 0.1 * p.detach())
                p.data -= 0.02 * history[p]
        for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


class Observed:
    """Records which parameters hold a gradient whenever one arrives."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {p: name for name, p in model.named_parameters()}
        self.held: list[set[str]] = []
        for p in self.names:
            p.register_post_accumulate_grad_hook(lambda _: self.held.append(self.now()))

    def now(self) -> set[str]:
        return {name for p, name in self.names.items() if p.grad is not None}


@pytest.mark.parametrize("rule", [None, LayerAdaptive()], ids=["none", "LayerAdaptive"])
def test_gradients_of_two_layers_never_exist_together(make_model, rule: Any) -> None:
    model = make_model()
    observed = Observed(model)  # its hooks run before those that step
    optimizer = optim.AdamW(model.parameters())
    layerwise.step_in_backward(optimizer, model, rule)
    for _ in range(2):
        model(torch.ones(3, 5, dtype=torch.float64)).sum().backward()
        assert not observed.now()
        optimizer.step()
    assert len(observed.held) == 12
    assert all(len({name.partition(".")[0] for name in held}) == 1 for held in observed.held)
    assert max(map(len, observed.held)) == 2  # weight and bias, whose norm is one


def test_a_layer_does_not_wait_for_its_frozen_parameters(make_model) -> None:
    model = make_model()
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    observed: list[bool] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: observed.append(model[2].weight.grad is None))
    optimizer = optim.SGD(model.parameters())
    layerwise.step_in_backward(optimizer, model)
    model(torch.ones(3, 5, dtype=torch.float64)).sum().backward()
    assert observed == [True]


class Branches(nn.Module):
    """A tied weight, a module that is used twice, a layer that only some steps use, a bias that no step uses."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.recompute = recompute
        self.first = nn.Linear(5, 5)
        self.shared = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.first.weight
        self.sometimes = nn.Linear(5, 5)
        self.partly = nn.Linear(5, 5)
        self.double()

    def forward(self, inputs: Tensor, step: int) -> Tensor:
        hidden = self.shared(torch.tanh(self.first(inputs)))
        block = self.block
        hidden = checkpoint(block, hidden, use_reentrant=False) if self.recompute else block(hidden)
        if step % 2:
            hidden = hidden + self.sometimes(hidden)
        return hidden @ self.partly.weight

    def block(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.tied(torch.tanh(self.shared(torch.relu(hidden)))))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rule", [None, LayerAdaptive(), LARS(), Constant({"*": 2.0})], ids=lambda r: type(r).__name__)
def test_tied_shared_unused_and_recomputed_layers(rule: Any, recompute: bool) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = Branches(recompute)
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        handle = attached(in_backward, optimizer, model, rule)
        for step in range(6):
            optimizer.zero_grad()
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            model(inputs, step).square().sum().backward()
            optimizer.step()
        return everything(model, optimizer, handle)

    assert_same(train)


@pytest.mark.parametrize("rule", [None, LayerAdaptive(), LARC()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize(
    "make", [lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9), lambda groups: optim.AdamW(groups, lr=0.1)]
)
def test_a_layer_in_several_groups(make_model, backward, make: Any, rule: Any) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        named = list(model.named_parameters())
        groups = [
            {"params": [(n, p) for n, p in named if n.endswith("weight")], "weight_decay": 0.1, "lr": 0.02},
            {"params": [(n, p) for n, p in named if n.endswith("bias")], "lr": torch.tensor(0.05)},
        ]
        optimizer = make(groups)
        if isinstance(optimizer, optim.SGD):  # one group with momentum and one without: no dampening can carry factors
            optimizer.param_groups[1]["momentum"] = 0.0
        handle = attached(in_backward, optimizer, None, rule)
        for step in range(4):
            backward(model, step)
            optimizer.step()
            optimizer.param_groups[1]["lr"].mul_(0.9)
        return everything(model, optimizer, handle)

    assert_same(train)


@pytest.mark.parametrize("rule", [None, LayerAdaptive()], ids=["none", "LayerAdaptive"])
def test_layers_that_are_frozen_and_thawed(make_model, backward, rule: Any) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        model[0].requires_grad_(False)
        optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        handle = attached(in_backward, optimizer, model, rule)
        for step in range(6):
            if step == 2:
                model[0].requires_grad_(True)
                model[2].bias.requires_grad_(False)
            if step == 4:
                model[2].requires_grad_(False)
            backward(model, step)
            optimizer.step()
        return everything(model, optimizer, handle)

    assert_same(train)


@pytest.mark.parametrize("rule", [None, LayerAdaptive(), LayerDecay(0.5)], ids=lambda r: type(r).__name__)
def test_parameters_added_moved_between_groups_or_in_no_layer(make_model, backward, rule: Any) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        scale = nn.Parameter(torch.ones(2, dtype=torch.float64))  # the model does not own it
        optimizer = optim.SGD([*model[2].parameters(), *model[4].parameters(), scale], lr=0.02, momentum=0.9)
        handle = attached(in_backward, optimizer, model, rule)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
            if step == 4:
                optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
            optimizer.zero_grad()
            inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            (model(inputs) * scale).square().sum().backward()
            optimizer.step()
        assert not in_backward or all(p._post_accumulate_grad_hooks for p in model.parameters())
        return [*everything(model, optimizer, handle), scale.detach()]

    assert_same(train)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("make", "momentum"), [(optim.SGD, 0.0), (optim.SGD, 0.9), (optim.Adagrad, 0.0)])
@pytest.mark.parametrize("rule", [None, LayerAdaptive(), Constant({"*": 3.0})], ids=lambda r: type(r).__name__)
def test_sparse_gradients(make: Any, rule: Any, momentum: float) -> None:
    """With momentum up to rounding: the form depends on whether other gradients are sparse, which is not known yet."""
    options = {"momentum": momentum} if momentum else {}

    def train(in_backward: bool) -> list[Any]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"table": nn.Embedding(9, 4, sparse=True), "head": nn.Linear(4, 2)}).double()
        optimizer = make(model.parameters(), lr=0.1, **options)
        handle = attached(in_backward, optimizer, model, rule)
        for step in range(4):
            optimizer.zero_grad()
            rows = torch.tensor([step, 2, 2, 5])
            model["head"](model["table"](rows)).square().sum().backward()
            optimizer.step()
        return everything(model, optimizer, handle)[:1]

    tolerance = 1e-13 if momentum else 0.0
    torch.testing.assert_close(train(True), train(False), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", [LayerAdaptive(), LARC(), chain(LARS(), LayerAdaptive())], ids=str)
def test_factors_as_tensors_as_for_many_layers_or_an_accelerator(make_model, backward, monkeypatch, rule: Any) -> None:
    monkeypatch.setattr(attaching, "MOST_NUMBERS", 0)

    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        handle = attached(in_backward, optimizer, model, rule)
        for step in range(4):
            backward(model, step)
            optimizer.step()
        return everything(model, optimizer, handle)

    assert_same(train)


class InverseNorm(ElementwiseRule):
    """f_l = 1 / ‖g_l‖."""

    def factor(self, gradient_norm: Any) -> Any:
        return 1 / gradient_norm


class HalfNorm(Rule):
    """f_l = ‖w_l‖ / 2; it declares that no layer needs another."""

    needs = ("weight_norm",)
    own_layer = True

    def factors(self, statistics: Any, state: Any) -> Any:
        return statistics.weight_norm / 2, state


class Warmup(Rule):
    """f_l = 1 − 2^-step, from nothing but the number of steps."""

    needs = ()
    own_layer = True

    def init(self, layers: Any, device: Any) -> Any:
        return {"step": 0, "_one": torch.ones(len(layers), dtype=torch.float64)}

    def factors(self, statistics: Any, state: Any) -> Any:
        step = state["step"] + 1
        return state["_one"] * (1 - 0.5**step), {**state, "step": step}


@pytest.mark.parametrize("rule", [InverseNorm(), HalfNorm(), Warmup()], ids=lambda rule: type(rule).__name__)
def test_custom_rules_step_as_in_an_adapter(make_model, backward, rule: Any) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        handle = attached(in_backward, optimizer, model, rule)
        for step in range(4):
            backward(model, step)
            optimizer.step()
        return everything(model, optimizer, handle)

    assert_same(train)


def test_momentum_that_a_scheduler_cycles(make_model, backward) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        handle = attached(in_backward, optimizer, model, LayerAdaptive())
        scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
        for step in range(8):
            backward(model, step)
            optimizer.step()
            scheduler.step()
        return everything(model, optimizer, handle)

    assert_same(train)


def test_momentum_that_a_checkpoint_brings_moves_the_factor_inside_it(make_model, backward) -> None:
    def train(in_backward: bool) -> list[Any]:
        model = make_model()
        optimizer = optim.SGD(model.parameters(), lr=0.02, weight_decay=0.1)
        handle = attached(in_backward, optimizer, model, LayerAdaptive())
        for step in range(6):
            if step == 3:
                other = optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=0.1)
                optimizer.load_state_dict(other.state_dict())
            backward(model, step)
            optimizer.step()
        return everything(model, optimizer, handle)

    assert_same(train)


def test_a_run_resumes_from_a_checkpoint_of_either_kind(make_model, backward) -> None:
    def train(kinds: list[bool]) -> list[Any]:
        saved: dict[str, Any] = {}
        for part, in_backward in enumerate(kinds):
            model = make_model()
            optimizer = optim.AdamW(model.parameters(), lr=0.02)
            handle = attached(in_backward, optimizer, model, LayerAdaptive())
            if saved:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            for step in range(3):
                backward(model, 3 * part + step)
                optimizer.step()
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return everything(model, optimizer, handle)

    plain = train([False, False, False])
    torch.testing.assert_close(train([True, False, True]), plain, rtol=0, atol=0)
    torch.testing.assert_close(train([False, True, True]), plain, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_the_last_rates_are_those_of_the_last_backward(make_model, rate: Any) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=rate)
    handle = layerwise.step_in_backward(optimizer, model, Constant({"0": 2.0, "4": 0.0}))
    assert handle.layers == ["0", "2", "4"]
    assert handle.get_last_factors() == {"0": 1.0, "2": 1.0, "4": 1.0}
    assert handle.get_last_lr() == {"0": 0.5, "2": 0.5, "4": 0.5}
    model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    if isinstance(rate, Tensor):
        rate.fill_(0.1)  # as a scheduler does
    else:
        optimizer.param_groups[0]["lr"] = 0.1
    assert handle.get_last_factors() == {"0": 2.0, "2": 1.0, "4": 0.0}
    assert handle.get_last_lr() == {"0": 1.0, "2": 0.5, "4": 0.0}
