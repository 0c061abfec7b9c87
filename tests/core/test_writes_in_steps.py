"""Steps whose writes are scaled: beside other hooks, adapters, closures, and where they end."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils._device import DeviceContext

import layerwise
from layerwise._writes import CannotScaleError, ScaledWrites
from layerwise.rules import Constant, LayerAdaptive, Rule

FACTORS = {"0": 0.5, "1": 3.0}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in FACTORS)).to(dtype)


def with_gradients(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def depth() -> int:
    return torch._C._len_torch_function_stack()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def expected(model: nn.Module, rate: float = 0.1) -> list[Tensor]:
    """Return the weights after a step of plain descent."""
    return [
        p.detach() - rate * f * p.grad
        for p, f in zip(model.parameters(), FACTORS.values(), strict=True)
        if p.grad is not None
    ]


def close(actual: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-14, atol=1e-14)


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


@pytest.mark.parametrize("early", [True, False])
def test_what_another_hook_writes_is_not_scaled(early: bool) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    seen: list[list[Tensor]] = []

    def register() -> None:
        optimizer.register_step_pre_hook(lambda *_: halve(model))
        optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
        optimizer.register_step_post_hook(lambda *_: halve(model))

    if early:
        register()
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    if not early:
        register()
    for step in range(3):
        with_gradients(model, step)
        start = [0.5 * w for w in weights(model)]
        wanted = [w - 0.1 * f * p.grad for w, p, f in zip(start, model.parameters(), FACTORS.values(), strict=True)]
        optimizer.step()
        close(seen[-1], wanted)
        close(weights(model), [0.5 * w for w in wanted])
        assert depth() == 0


def test_a_hook_that_raises_leaves_nothing_behind() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    fails = [False, True, False]

    def hook(*_: Any) -> None:
        if fails.pop():
            raise ZeroDivisionError

    first = optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_pre_hook(hook)
    for step in range(3):
        with_gradients(model, step)
        wanted = expected(model) if step != 1 else weights(model)
        if step == 1:
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            first.remove()
        else:
            optimizer.step()
        close(weights(model), wanted)
        assert depth() == 0
    assert not fails


@pytest.mark.parametrize("places", [("update", "update"), ("lr", "update"), ("update", "gradient")])
def test_the_factors_of_two_adapters_multiply(places: Any) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for place, factors in zip(places, ({"0": 0.5, "1": 1.5}, {"1": 2.0}), strict=True):
        layerwise.LayerwiseLR(optimizer, Constant(factors), model, apply=place)
    for step in range(3):
        with_gradients(model, step)
        wanted = expected(model)
        optimizer.step()
        close(weights(model), wanted)


def test_an_adapter_detached_inside_a_step_leaves_no_mode() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")

    optimizer.register_step_pre_hook(lambda *_: adapter.detach())
    for step in range(2):
        with_gradients(model, step)
        optimizer.step()
        assert depth() == 0


@pytest.mark.parametrize("kind", [optim.SGD, optim.Rprop, optim.ASGD])
def test_a_closure_runs_outside_of_the_scaling(kind: Any) -> None:
    results: list[list[Tensor]] = []
    for closes in (False, True):
        model = network()
        optimizer = kind(model.parameters(), lr=0.1)
        layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
        buffer = model[0].weight.detach()  # shares the weight's memory

        def closure(model: nn.Module = model, step: int = 0, buffer: Tensor = buffer) -> float:
            assert depth() == 0
            with_gradients(model, step)
            buffer.mul_(1.0)
            return 0.0

        for step in range(3):
            if closes:
                optimizer.step(lambda closure=closure, step=step: closure(step=step))
            else:
                with_gradients(model, step)
                optimizer.step()
        results.append(weights(model))
    close(*results)


class Step(optim.Optimizer):
    """Writes in a way of its own."""

    def __init__(self, params: Any, write: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.write = write

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.write(p)


def scaled(model: nn.Module, write: Any) -> None:
    """Take a step by hand under the mode."""
    parameters = list(model.parameters())
    optimizer = Step(parameters, write)
    mode = ScaledWrites(parameters, optimizer.state)
    mode.scale(zip(parameters, FACTORS.values(), strict=True))
    optimizer.register_step_pre_hook(lambda *_: mode.begin())
    optimizer.register_step_post_hook(lambda *_: mode.end())
    optimizer.step()


def test_a_function_told_to_work_in_place_is_scaled() -> None:
    model = network()
    start = weights(model)
    scaled(model, lambda p: F.relu(p.data, inplace=True))
    close(weights(model), [w + f * (w.relu() - w) for w, f in zip(start, FACTORS.values(), strict=True)])


def test_state_in_the_buffer_of_a_parameter_is_not_scaled() -> None:
    buffer = torch.ones(6, dtype=torch.float64)
    p = nn.Parameter(buffer[:3])
    mode = ScaledWrites([p], {})
    mode.scale([(p, 0.5)])
    with torch.no_grad():
        mode.begin()
        buffer[3:].mul_(0.8)
        p.data.sub_(0.1)
        mode.end()
    torch.testing.assert_close(buffer, torch.tensor([0.95] * 3 + [0.8] * 3, dtype=torch.float64), rtol=0, atol=0)


def test_memory_under_two_parameters_is_scaled_once_or_refused() -> None:
    buffer = torch.ones(3, dtype=torch.float64)
    one, other = nn.Parameter(buffer[:2]), nn.Parameter(buffer[1:])
    mode = ScaledWrites([one, other], {})
    mode.scale([(one, 0.5), (other, 2.0)])
    with torch.no_grad():
        mode.begin()
        one.sub_(0.1)
        with pytest.raises(CannotScaleError, match="several parameters share"):
            buffer.data.sub_(0.1)
        mode.end()
    torch.testing.assert_close(buffer, torch.tensor([0.95, 0.95, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [optim.SGD, optim.ASGD, optim.Rprop, optim.Adam])
def test_half_precision_under_update_rounds_once(kind: Any, dtype: torch.dtype) -> None:
    """A finished step scaled afterwards would round twice, and lose a step that is smaller than half a unit."""
    model, wide = network(dtype), network(dtype).double()
    for one in (model, wide):
        options = {"eps": 1e-3} if kind is optim.Adam else {}
        optimizer = kind(one.parameters(), lr=2e-3, **options)
        layerwise.LayerwiseLR(optimizer, Constant(FACTORS), one, apply="update")
        with_gradients(one)
        optimizer.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert ((p.double() - q).abs() <= 2 * torch.finfo(dtype).eps * q.abs().clamp(min=1e-3)).all()


def test_a_parameter_without_numbers_is_no_matter() -> None:
    parameters = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2))]
    optimizer = optim.SGD([("a", parameters[0]), ("b", parameters[1])], lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), layers="parameter", apply="update")
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(parameters[1].detach(), torch.full((2,), 0.8))


@pytest.mark.parametrize("many", [False, True])
def test_decay_in_half_precision_keeps_a_factor_on_the_device(many: bool) -> None:
    p = nn.Parameter(torch.linspace(1, 3, 50).to(torch.bfloat16))
    start = p.detach().float()
    mode = ScaledWrites([p], {})
    mode.scale([(p, torch.tensor(1.5))])
    with torch.no_grad():
        mode.begin()
        if many:
            torch._foreach_mul_([p], 0.99)
        else:
            p.mul_(0.99)
        mode.end()
    assert torch.equal(p.detach(), (start * 0.985).to(torch.bfloat16))


class Projected(optim.SGD):
    """Clamps weights, at first to a range that no weight leaves; or normalises them in every `every`-th step."""

    def __init__(self, params: Any, lr: float = 0.1, every: int = 0) -> None:
        super().__init__(params, lr=lr)
        self.every, self.count = every, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        self.count += 1
        for p in self.param_groups[0]["params"]:
            if not self.every:
                p.clamp_(-100.0, 100.0)
            elif self.count % self.every == 0:
                p.div_(p.norm())


def test_a_projection_that_toys_do_not_reach_acts_once() -> None:
    parameters = [nn.Parameter(torch.tensor([99.9, 1.0], dtype=torch.float64)) for _ in FACTORS]
    optimizer = Projected([(f"{i}.weight", p) for i, p in enumerate(parameters)])
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), apply="update")
    for p in parameters:
        p.grad = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    optimizer.step()  # to the clamped 100, and a part or a multiple of the way there
    close(
        [p.detach() for p in parameters], [torch.tensor(w, dtype=torch.float64) for w in ([99.95, 0.95], [100.2, 0.7])]
    )


def test_a_second_write_that_follows_from_the_weights_raises() -> None:
    model = network()
    optimizer = Projected(model.parameters(), every=20)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    for step in range(19):
        with_gradients(model, step)
        optimizer.step()
    with_gradients(model, 19)
    with pytest.raises(CannotScaleError, match="twice"):
        optimizer.step()
    assert depth() == 0


class Limited(optim.Optimizer):
    """Keeps weights within a limit, if there is one."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float | None = None) -> None:
        super().__init__(params, {"lr": lr, "limit": limit})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
                if group["limit"]:
                    p.clamp_(-group["limit"], group["limit"])


def test_an_option_that_is_set_later_is_tried_again() -> None:
    model = network()
    optimizer = Limited(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    assert "by scaled writes" in repr(adapter)
    optimizer.param_groups[0]["limit"] = 50.0
    with_gradients(model)
    wanted = expected(model)
    optimizer.step()
    close(weights(model), wanted)
    assert "by interpolation" in repr(adapter)


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Within(optim.Optimizer):
    """Evaluates its closure inside a mode that ends before the update."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with Mode():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("flat", [False, True])
def test_a_mode_around_the_closure_ends_before_the_scaling(flat: bool) -> None:
    model = network()
    if flat:
        buffer = torch.cat([p.detach().flatten() for p in model.parameters()])
        for p, part in zip(model.parameters(), buffer.split(9), strict=True):
            p.data = part.view(3, 3)
    optimizer = Within(model.parameters())
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    with_gradients(model)
    wanted = expected(model)
    optimizer.step(lambda: with_gradients(model))
    close(weights(model), wanted)
    assert depth() == 0


def test_columns_of_a_matrix_have_factors_of_their_own() -> None:
    matrix = torch.ones(2, 4, dtype=torch.float64)
    parameters = [nn.Parameter(matrix[:, :2]), nn.Parameter(matrix[:, 2:])]
    mode = ScaledWrites(parameters, {})
    mode.scale(zip(parameters, (0.5, 2.0), strict=True))
    with torch.no_grad():
        mode.begin()
        for p in parameters:
            p.data.sub_(0.1)
        mode.end()
    assert matrix[0].tolist() == pytest.approx([0.95, 0.95, 0.8, 0.8], rel=1e-15)


def test_a_replaced_part_of_a_buffer_leaves_the_other_scaled() -> None:
    buffer = torch.ones(4, dtype=torch.float64)
    one, other = nn.Parameter(buffer[:2]), nn.Parameter(buffer[2:])
    mode = ScaledWrites([one, other], {})
    mode.scale([(one, 0.5), (other, 2.0)])
    with torch.no_grad():
        mode.begin()
        one.data = one.data - 0.1
        other.data.sub_(0.1)
        mode.end()
    assert [*one.tolist(), *other.tolist()] == pytest.approx([0.95, 0.95, 0.8, 0.8], rel=1e-15)


def test_parameters_of_inference_mode_are_scaled() -> None:
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
    optimizer = optim.SGD([("a", p)], lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), layers="parameter", apply="update")
    with torch.inference_mode():
        optimizer.step()
        torch.testing.assert_close(p, torch.full((2,), 1 - 0.1 * adapter.get_last_factors()["a"]))


def test_weight_decay_that_is_raised_in_place_is_seen() -> None:
    class Fixed(Rule):
        default_place, default_decay = "gradient", "plain"

        def factors(self, statistics: Any, state: Any) -> Any:
            return torch.tensor([0.5, 2.0], dtype=torch.float64), state

    parameters = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in FACTORS]
    decay = torch.tensor(0.0, dtype=torch.float64)
    optimizer = optim.SGD([(f"{i}.weight", p) for i, p in enumerate(parameters)], lr=0.1, weight_decay=decay)
    adapter = layerwise.LayerwiseLR(optimizer, Fixed())
    for step in range(2):
        decay.fill_(float(step))
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert adapter.apply == "gradient"
    assert [p.item() for p in parameters] == pytest.approx([0.805, 0.52], rel=1e-14)


class OnDevice(Within):
    """Evaluates its closure while a device is the default one."""

    device: Any

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with self.device():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                with self.device():
                    p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("device", [torch.device, DeviceContext])
@pytest.mark.parametrize("around", [False, True])
def test_a_default_device_inside_the_step_begins_and_ends(around: bool, device: Any) -> None:
    model = network()
    optimizer = OnDevice(model.parameters())
    optimizer.device = lambda: device("cpu")
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    with_gradients(model)
    wanted = expected(model)
    with device("cpu") if around else contextlib.nullcontext():
        optimizer.step(lambda: with_gradients(model))
    close(weights(model), wanted)
    assert depth() == 0
