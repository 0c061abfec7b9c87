"""The places against the papers' and Caffe's formulas, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

import layerwise
from layerwise.apply import Factors
from layerwise.rules import Constant, LayerAdaptive
from optimizer_cases import CASES, MUON, Case, assert_same_bits, network, relative_difference, take_step, weights

SGD_CASES = [case for case in CASES if case.optimizer is optim.SGD]
names = {"ids": str}


def layer_factor(gradients: list[Tensor]) -> float:
    """Equation 9 of Singh 2015, from the gradients of one layer."""
    norm = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
    return float(1 + torch.log1p(torch.tensor(1 / norm, dtype=torch.float64))) if norm else 1.0


def by_layer(model: nn.Module) -> list[list[nn.Parameter]]:
    return [list(layer.parameters()) for layer in model.children()]


def caffe_step(
    params: list[list[nn.Parameter]], history: dict[Any, Tensor], options: dict[str, Any], steps: int
) -> None:
    """Caffe's SGD and Nesterov (sgd_solver.cpp, nesterov_solver.cpp), with eq. 9 inside the local rate."""
    rate, momentum, decay = options["lr"], options.get("momentum", 0.0), options.get("weight_decay", 0.0)
    sign = -1 if options.get("maximize") else 1
    damping = options.get("dampening", 0.0) if steps else 0.0  # torch's, which Caffe has not; not at the first step
    for layer in params:
        factor = layer_factor([p.grad for p in layer])
        for p in layer:
            local = rate * factor
            d = sign * p.grad + decay * p.detach()
            old = history.get(p, torch.zeros_like(p))
            new = momentum * old + (1 - damping) * local * d
            update = (1 + momentum) * new - momentum * old if options.get("nesterov") else new
            history[p] = new
            with torch.no_grad():
                p -= update


def keep_on_device(patch: pytest.MonkeyPatch) -> None:
    """Keep factors as tensors, as on an accelerator, but with values."""
    original = Factors.__init__

    def keep(self: Factors, *arguments: Any) -> None:
        original(self, *arguments)
        self.numbers = None

    patch.setattr(Factors, "__init__", keep)


@pytest.fixture(params=["numbers", "device"])
def factors_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with numbers as on the CPU, and with tensors as elsewhere."""
    if request.param == "device":
        keep_on_device(monkeypatch)
    return request.param


@pytest.mark.pairwise
@pytest.mark.parametrize("place", ["gradient", "auto"])
@pytest.mark.parametrize("case", SGD_CASES, **names)
def test_gradient_on_sgd_and_nag_equals_caffe(case: Case, place: str, factors_kept: str) -> None:
    attached, reference = network(case), network(case)
    optimizer, history = case.make(attached.parameters()), {}
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), attached, apply=place)
    for step in range(30):
        take_step(attached, optimizer, step)
        for p in reference.parameters():
            p.grad = None
        reference.loss(step).backward()
        caffe_step(by_layer(reference), history, case.options, step)
        rate_in_float32 = factors_kept == "device" and case.form.get("fused") and "momentum" not in case.options
        assert relative_difference(weights(attached), weights(reference)) < (1e-7 if rate_in_float32 else 1e-12)


@pytest.mark.pairwise
@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_adagrad_equals_equation_12(form: dict[str, Any], decay: float, factors_kept: str) -> None:
    case = Case(optim.Adagrad, {"lr": 0.1, "eps": 1e-8, "weight_decay": decay}, form)
    attached, reference = network(case), network(case)
    optimizer = case.make(attached.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), attached)
    history: dict[Any, Tensor] = {}
    for step in range(30):
        take_step(attached, optimizer, step)
        for p in reference.parameters():
            p.grad = None
        reference.loss(step).backward()
        for layer in by_layer(reference):
            factor = layer_factor([p.grad for p in layer])
            for p in layer:
                d = p.grad + decay * p.detach()
                history[p] = history.get(p, torch.zeros_like(p)) + d**2  # the sum is of gradients, not of scaled ones
                with torch.no_grad():
                    p -= 0.1 * factor * d / (history[p].sqrt() + 1e-8)
        # A rate kept as a tensor is float32 in the fused kernels.
        tolerance = 1e-5 if factors_kept == "device" and form.get("fused") else 1e-12
        assert relative_difference(weights(attached), weights(reference)) < tolerance


@pytest.mark.pairwise
@pytest.mark.parametrize("case", [c for c in SGD_CASES if c.options.get("weight_decay")], **names)
def test_plain_decay_is_not_scaled(case: Case, factors_kept: str) -> None:
    attached, reference = network(case), network(case)
    optimizer, plain = case.make(attached.parameters()), case.make(reference.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), attached, apply="gradient", decay="plain")
    for step in range(20):
        take_step(attached, optimizer, step)
        plain.zero_grad()
        reference.loss(step).backward()
        for layer in by_layer(reference):
            factor = layer_factor([p.grad for p in layer])
            for p in layer:
                p.grad.mul_(factor)
        plain.step()
        assert relative_difference(weights(attached), weights(reference)) < 1e-13


@pytest.mark.pairwise
@pytest.mark.parametrize("place", ["gradient", "lr", "update"])
@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer not in (optim.ASGD, optim.Rprop)], **names)
def test_factors_kept_on_the_device_give_what_numbers_give(
    case: Case, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kept in (False, True):
        model = network(case)
        optimizer = case.make(model.parameters())
        with monkeypatch.context() as patch:
            if kept:
                keep_on_device(patch)
            if case.optimizer is optim.SparseAdam and place == "gradient" and kept:
                continue  # sparse gradients are scaled on the CPU only through numbers
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
            for step in range(5):
                take_step(model, optimizer, step)
        results.append(weights(model))
    if len(results) == 2:
        assert relative_difference(*results) < (1e-6 if place == "lr" else 1e-12)


def test_the_gradient_is_left_scaled_when_asked_for_and_alone_when_not() -> None:
    for place, factor in (("gradient", 3.0), ("auto", 1.0)):
        model = nn.Linear(2, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        rule = layerwise.rules.chain(LayerAdaptive(), Constant({"*": 1.0}))
        layerwise.LayerwiseLR(optimizer, rule, model, apply=place, bounds=(3.0, 3.0))
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
            torch.testing.assert_close(model.weight.grad, torch.full((1, 2), 4.0 * factor))


# The bare step of these reads a value by itself; the fused kernels have no form for fake tensors.
UNFIT = {optim.SparseAdam, optim.Adafactor, optim.ASGD, optim.Rprop, MUON}
FAKE = [
    (case, place)
    for case in CASES
    for place in ("gradient", "lr", "update")
    if case.optimizer not in UNFIT and not case.form.get("fused")
]


def fake_step(case: Case, place: str, *, capturable: bool = False) -> int:
    """Take three steps on fake CUDA tensors, of which no value can be read; return how often factors were read."""
    reads = 0

    def read(self: Factors) -> list[float]:
        nonlocal reads
        reads += 1
        return [1.5] * 2

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Factors, "read", read)
        named, optimizer = fake_network(case, capturable=capturable)
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), apply=place)
        for _ in range(3):
            for _, p in named:
                p.grad = torch.empty_like(p)
            optimizer.step()
    return reads


def fake_network(case: Case, *, capturable: bool = False) -> tuple[list[tuple[str, nn.Parameter]], optim.Optimizer]:
    shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 6)}
    named = [(name, nn.Parameter(torch.empty(shape, device="cuda"))) for name, shape in shapes.items()]
    return named, case.optimizer(named, **case.options, **case.form, **({"capturable": True} if capturable else {}))


@pytest.mark.pairwise
@pytest.mark.parametrize(("case", "place"), FAKE, ids=str)
def test_factors_are_read_from_a_cuda_device_once_a_step(case: Case, place: str) -> None:
    assert fake_step(case, place) == 3


@pytest.mark.parametrize("optimizer", [optim.Adam, optim.AdamW, optim.NAdam, optim.Adamax], ids=lambda c: c.__name__)
@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_capturable_optimizer_reads_no_rate(optimizer: type[optim.Optimizer], form: dict[str, Any]) -> None:
    assert fake_step(Case(optimizer, {"lr": 0.1}, form), "lr", capturable=True) == 0


def test_an_sgd_step_under_auto_needs_no_pass_over_the_gradient() -> None:
    """The factor inside the momentum acts through the dampening, on a split of the groups only."""
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        versions = [p.grad._version for p in model.parameters()]
        optimizer.step()
        assert [p.grad._version for p in model.parameters()] == versions
    assert_same_bits([p.grad for p in model.parameters()], [torch.ones(2, 3), torch.ones(2)])
