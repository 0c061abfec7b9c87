"""Steps on a device against the same on the CPU; `make gpu` names the device, elsewhere it is the CPU itself.

On an accelerator factors stay on the device and are applied in other ways, to the same weights but for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise.apply import Factors
from layerwise.optimizers import PlaceName
from layerwise.rules import LARS, LayerAdaptive

DEVICE = torch.device(os.environ.get("LAYERWISE_TEST_DEVICE", "cpu"))
MAKERS: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": lambda p, **form: optim.SGD(p, lr=0.05, weight_decay=0.1, **form),
    "SGD momentum": lambda p, **form: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **form),
    "SGD Nesterov": lambda p, **form: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **form),
    "Adam": lambda p, **form: optim.Adam(p, lr=0.01, weight_decay=0.1, **form),
    "AdamW": lambda p, **form: optim.AdamW(p, lr=0.01, weight_decay=0.1, **form),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": True, "capturable": True},
}
CASES = [
    (name, form)
    for name in MAKERS
    for form in FORMS
    if form != "capturable" or ("Adam" in name and DEVICE.type != "cpu")
]
PLACES: tuple[PlaceName | None, ...] = (None, "gradient", "lr", "update")


def made(device: torch.device) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model.double().to(device)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return model(inputs.to(next(model.parameters()).device)).square().sum() / 10**step


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_near(actual: object, expected: object) -> None:
    # A factor on an accelerator may be float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7, check_device=False)


@pytest.fixture(params=[LayerAdaptive(), LARS(0.02)], ids=["LayerAdaptive", "LARS"])
def rule(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.filterwarnings("ignore")  # under Adam a factor on the gradient does little, and a step may be captured
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_steps_and_factors_are_those_of_the_cpu(name: str, form: str, place: PlaceName | None, rule: Any) -> None:
    found = []
    for device, options in ((torch.device("cpu"), {"foreach": False}), (DEVICE, FORMS[form])):
        model = made(device)
        optimizer = MAKERS[name](model.named_parameters(), **options)
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply=place or "auto")
        train(model, optimizer)
        assert all(p.device.type == device.type for p in model.parameters())
        found.append((adapter.get_last_factors(), list(model.parameters())))
    assert set(found[0][0].values()) != {1.0}
    assert_near(found[1], found[0])


@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_a_gradient_scaler_skips_and_takes_steps(form: str) -> None:
    found = []
    for device, scaled in ((torch.device("cpu"), False), (DEVICE, True)):
        model = made(device)
        optimizer = MAKERS["SGD momentum"](model.parameters(), **FORMS[form])
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        scaler = torch.amp.GradScaler(device.type, init_scale=8.0, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, step) * (float("inf") if step == 1 else 1.0)
            if step == 1 and not scaled:
                continue
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(list(model.parameters()))
    assert_near(found[1], found[0])


def test_stepping_in_backward_gives_the_weights_of_the_cpu() -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = made(device)
        optimizer = MAKERS["AdamW"](model.parameters())
        layerwise.step_in_backward(optimizer, model, LayerAdaptive())
        for step in range(3):
            loss_of(model, step).backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        found.append(list(model.parameters()))
    assert_near(found[1], found[0])


def test_a_monitor_measures_what_it_measures_on_the_cpu() -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = made(device)
        optimizer = MAKERS["SGD momentum"](model.parameters())
        records: list[Any] = []
        monitor = layerwise.Monitor(optimizer, model, every=1, sinks=[records.append])
        train(model, optimizer)
        monitor.detach()
        found.append([dict(record.scalars()) for record in records])
    assert len(found[0]) == 4
    assert_near(found[1], found[0])


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu() -> None:
    whole, first, second = made(DEVICE), made(DEVICE), made(torch.device("cpu"))
    optimizers = [MAKERS["AdamW"](model.parameters()) for model in (whole, first, second)]
    adapters = [
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        for optimizer, model in zip(optimizers, (whole, first, second), strict=True)
    ]
    train(whole, optimizers[0])
    train(whole, optimizers[0])
    train(first, optimizers[1])
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    adapters[2].load_state_dict(adapters[1].state_dict())
    train(second, optimizers[2])
    assert_near(list(second.parameters()), list(whole.parameters()))


def test_last_factors_follow_the_replays_of_a_graph() -> None:
    """A replay runs no Python: it writes other factors into the tensor of the step that was captured."""
    model = made(DEVICE)
    optimizer = MAKERS["SGD"](model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    written = torch.tensor([1.0, 2.0, 4.0], device=DEVICE)
    adapter._attached.factors = factors = Factors(written, [True] * 3, None)
    factors.numbers = None  # as on an accelerator
    for _ in range(2):
        assert list(adapter.get_last_factors().values()) == written.tolist()
        written.mul_(3)
