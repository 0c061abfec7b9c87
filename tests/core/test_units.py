"""`layers="unit"`, a factor for each output row, against loops written by hand and timm's clipping of gradients."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_launches import MOST, Launches
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

import layerwise
from layerwise._places.allowed import check_rows
from layerwise._places.units import UnitFactors
from layerwise.rules import (
    AGC,
    LARC,
    LARS,
    Constant,
    LayerAdaptive,
    Trust,
    UpdateClip,
    UpdateFloor,
    bounds,
    chain,
    refresh,
)
from optimizer_cases import assert_same_bits

SHAPE = (4, 3, 6, 6)
Floor = UpdateFloor(50.0)


class Conv1D(nn.Module):
    """A weight of inputs × outputs, as GPT-2's in Hugging Face's Transformers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def network(dtype: torch.dtype = torch.float64, *, outputs_last: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    first: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, groups=2)]
    last: list[nn.Module] = [nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), Conv1D(7, 125), nn.Linear(7, 2)]
    return nn.Sequential(*first, *(last if outputs_last else [nn.Flatten(), nn.Linear(96, 2)])).to(dtype)


def backward(model: nn.Module, step: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    (scale * model(x).float().square().sum()).backward()


def dimension_of(model: nn.Module, p: Tensor) -> int | None:
    """Return the dimension of a parameter's outputs; None for a parameter that is one unit."""
    owner = next(m for m in model.modules() if any(own is p for own in m.parameters(recurse=False)))
    return None if p.ndim < 2 else int(isinstance(owner, (Conv1D, nn.ConvTranspose2d)))


def norm(tensor: Tensor, dimension: int | None) -> Tensor:
    """Return ‖·‖ of each unit in float64, in a shape that multiplies the tensor."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    others = [i for i in range(tensor.ndim) if i != dimension]
    return wide.abs().square().sum(others, keepdim=True).sqrt() if others else wide.abs()


def by_hand(model: nn.Module, factor: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Return φ(‖g_u‖, ‖w_u‖) of the units of each parameter."""
    result: list[Tensor] = []
    for p in model.parameters():
        dimension = dimension_of(model, p)
        assert p.grad is not None
        result.append(factor(norm(p.grad, dimension), norm(p, dimension)))
    return result


def of_agc(clip: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda g, w: (clip * w.clamp(min=1e-3) / g).clamp(max=1)


def of_ratio(g: Tensor, w: Tensor) -> Tensor:
    return g / w.clamp(min=1e-3)


def of_layer_adaptive(g: Tensor, _: Tensor) -> Tensor:
    return 1 + torch.log1p(1 / g)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def furthest(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


# --- The published method ---------------------------------------------------------------------------------------------


@pytest.fixture
def adaptive_clip_grad() -> Any:
    """That of timm, whose package cannot be imported without torchvision."""
    try:
        path = importlib.metadata.distribution("timm").locate_file("timm/utils/agc.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed")
    spec = importlib.util.spec_from_file_location("agc_of_timm", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD fused": (optim.SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}),
    "SGD foreach": (optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "foreach": True}),
    "AdamW": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW fused": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True, "fused": True}),
    "RMSprop": (optim.RMSprop, {"lr": 0.001, "momentum": 0.9, "foreach": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.01, 0.3])
def test_agc_is_that_of_timm(adaptive_clip_grad: Any, name: str, clip: float) -> None:
    build, options = OPTIMIZERS[name]
    model, twin = network(outputs_last=False), network(outputs_last=False)
    first, second = build(model.parameters(), **options), build(twin.parameters(), **options)
    layerwise.LayerwiseLR(first, AGC(clip), model, layers="unit")
    for step in range(8):
        backward(model, step)
        backward(twin, step)
        adaptive_clip_grad(twin.parameters(), clip_factor=clip)
        first.step()
        second.step()
        assert furthest([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()]) <= 1e-12
    assert furthest(values(model), values(twin)) <= 1e-12


def test_rows_are_outputs_and_vectors_are_one_unit() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    backward(model)
    clip = float(torch.cat([x.flatten() for x in by_hand(model, of_ratio)]).median())
    adapter = layerwise.LayerwiseLR(optimizer, AGC(clip), model, layers="unit")
    gradients, factors = [p.grad.clone() for p in model.parameters()], by_hand(model, of_agc(clip))
    for p, f in zip(model.parameters(), factors, strict=True):
        assert f.numel() == (1 if p.ndim < 2 else p.shape[dimension_of(model, p)])
    some = [f for f in factors if f.numel() > 1 and f.min() < 1 == f.max()]
    assert some, "no parameter has clipped rows beside others"
    optimizer.step()
    wanted = [g * f for g, f in zip(gradients, factors, strict=True)]
    assert furthest([p.grad for p in model.parameters()], wanted) <= 1e-15
    names = [name for name, _ in model.named_parameters()]
    assert adapter.layers == names
    assert list(adapter.get_last_factors()) == names
    assert list(adapter.get_last_factors().values()) == pytest.approx([float(f.mean()) for f in factors])
    rates = {name: 0.01 * factor for name, factor in adapter.get_last_factors().items()}
    assert adapter.get_last_lr() == pytest.approx(rates)
    assert f"{len(names)} layers, {sum(f.numel() for f in factors)} units" in repr(adapter)


def test_a_step_that_clips_nothing_is_the_bare_one() -> None:
    model, bare = network(), network()
    first, second = (optim.SGD(m.parameters(), lr=0.01, momentum=0.9, fused=True) for m in (model, bare))
    seen: list[Any] = []
    layerwise.LayerwiseLR(first, AGC(1e9), model, layers="unit")
    first.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(args[0]))
    backward(model)
    backward(bare)
    first.step()
    second.step()
    assert_same_bits(values(model), values(bare))
    assert seen == [first]


def test_parameters_of_which_no_row_is_clipped_are_not_multiplied() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    backward(model)
    clip = float(torch.stack([x.max() for x in by_hand(model, of_ratio)]).median())
    layerwise.LayerwiseLR(optimizer, AGC(clip), model, layers="unit")
    clipped = [bool((f < 1).any()) for f in by_hand(model, of_agc(clip))]
    assert len(set(clipped)) == 2
    versions = [p.grad._version for p in model.parameters()]
    optimizer.step()
    assert [p.grad._version > v for p, v in zip(model.parameters(), versions, strict=True)] == clipped


# --- Places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", ["scaled", "plain"])
def test_factors_act_on_the_gradient(name: str, decay: Any) -> None:
    build, options = OPTIMIZERS[name]
    model, twin = network(), network()
    optimizer, bare = build(model.parameters(), **options), build(twin.parameters(), **options)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers="unit", apply="gradient", decay=decay)
    coupled = decay == "scaled" and options.get("weight_decay") and build is optim.SGD
    for step in range(4):
        backward(model, step)
        backward(twin, step)
        with torch.no_grad():
            for p, f in zip(twin.parameters(), by_hand(twin, of_layer_adaptive), strict=True):
                p.grad = f * (p.grad + 0.1 * p if coupled else p.grad)
        if coupled:
            bare.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        bare.step()
    assert furthest(values(model), values(twin)) <= 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", [LayerAdaptive(), Floor], ids=repr)
def test_factors_act_on_the_update(name: str, rule: Any) -> None:
    """`w ← w_old + f (w_new − w_old)`, with w_new of a twin that has no adapter and the same weights at each step."""
    build, options = OPTIMIZERS[name]
    model, twin = network(), network()
    optimizer, bare = build(model.parameters(), **options), build(twin.parameters(), **options)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, layers="unit", apply="update", exclude=None)
    seen: set[float] = set()
    for step in range(3):
        twin.load_state_dict(model.state_dict())
        backward(model, step)
        backward(twin, step)
        old, factors = values(twin), by_hand(twin, of_layer_adaptive)
        optimizer.step()
        bare.step()
        new = values(twin)
        if rule is Floor:
            dimensions = [dimension_of(twin, p) for p in twin.parameters()]
            parts = list(zip(old, new, dimensions, strict=True))
            factors = [
                (50.0 * norm(w, d) / (norm(v - w, d) / options["lr"])).clamp(min=1).nan_to_num(1, posinf=1)
                for w, v, d in parts
            ]
        wanted = [w + f * (v - w) for w, v, f in zip(old, new, factors, strict=True)]
        torch.testing.assert_close(values(model), wanted, rtol=1e-12, atol=1e-13)
        seen |= {float(f) for one in factors for f in one.flatten()}
    assert len(seen) > 20
    assert adapter.apply == "update"


def test_what_auto_takes() -> None:
    model = network()
    adam, sgd = optim.AdamW(model.parameters()), optim.SGD(model.parameters(), lr=0.1)
    momentum = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for optimizer, rule, place in (
        (adam, AGC(), "gradient"),
        (sgd, AGC(), "gradient"),
        (adam, LayerAdaptive(), "update"),
        (sgd, LayerAdaptive(), "update"),
        (momentum, LayerAdaptive(), "gradient"),
        (adam, UpdateFloor(), "update"),
    ):
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, layers="unit")
        assert adapter.apply == place
        adapter.detach()


def test_parts_of_split_parameters_are_clipped_under_any_optimizer() -> None:
    model = nn.Linear(2, 4)
    adapter = layerwise.LayerwiseLR(optim.AdamW(model.parameters()), AGC(), model, split={"weight": 2})
    assert adapter.apply == "gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("place", ["gradient", "update"])
def test_other_types(dtype: torch.dtype, place: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(5, 700, dtype=torch.complex128, generator=generator) for _ in range(2))
    weight, gradient = (x.to(dtype) if dtype.is_complex else x.real.to(dtype) for x in (weight, gradient))
    model = nn.ParameterDict({"a": nn.Parameter(weight.clone())})
    model["a"].grad = gradient.clone()
    optimizer = optim.SGD(model.parameters(), lr=0.5, foreach=True)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers="unit", apply=place)
    optimizer.step()
    factors = of_layer_adaptive(norm(gradient, 0), norm(weight, 0))
    step = 0.5 * factors * gradient.to(torch.complex128 if dtype.is_complex else torch.float64)
    # The weights are rounded, and on the update so is the step of the optimizer, and the factor.
    rounding = 4 * torch.finfo(dtype).eps * (1 + 2 * (place == "update"))
    assert float((model["a"].detach() - (weight - step)).abs().max()) <= rounding * float(weight.abs().max())


def test_memory_in_another_order() -> None:
    model = network(outputs_last=False).to(memory_format=torch.channels_last)
    twin = network(outputs_last=False)
    for one in (model, twin):
        optimizer = optim.SGD(one.parameters(), lr=0.01, momentum=0.9)
        layerwise.LayerwiseLR(optimizer, AGC(0.3), one, layers="unit")
        for step in range(3):
            backward(one, step)
            optimizer.step()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert furthest(values(model), values(twin)) <= 1e-12


# --- Steps of all kinds -----------------------------------------------------------------------------------------------


def clipped(model: nn.Module, clip: float = 0.3) -> None:
    """Clip by hand."""
    for p, f in zip(model.parameters(), by_hand(model, of_agc(clip)), strict=True):
        p.grad = p.grad * f.nan_to_num(1).to(p.dtype)


def pair(rule: Any = None, **arguments: Any) -> tuple[nn.Module, optim.Optimizer, nn.Module, optim.Optimizer, Any]:
    model, twin = network(), network()
    first, second = (optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, twin))
    adapter = layerwise.LayerwiseLR(first, AGC(0.3) if rule is None else rule, model, layers="unit", **arguments)
    return model, first, twin, second, adapter


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["closure", "compiled", "accumulated"])
def test_kinds_of_steps(kind: str) -> None:
    model, first, twin, second, _ = pair()
    step_of = torch.compile(first.step, backend="eager") if kind == "compiled" else first.step
    for step in range(3):
        backward(twin, step)
        if kind == "accumulated":
            twin(torch.ones(SHAPE, dtype=torch.float64)).sum().backward()
        clipped(twin)
        second.step()
        if kind == "closure":
            first.step(lambda step=step: backward(model, step))
            continue
        backward(model, step)
        if kind == "accumulated":
            model(torch.ones(SHAPE, dtype=torch.float64)).sum().backward()
        step_of()
    assert furthest(values(model), values(twin)) <= 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler(fused: bool) -> None:
    results: list[list[Tensor]] = []
    for scale in (1.0, 2.0**12):
        model = network(torch.float32)
        optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
        adapter = layerwise.LayerwiseLR(optimizer, AGC(0.3), model, layers="unit")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(SHAPE, generator=generator)).square().sum()).backward()
            if step == 2:
                model[0].weight.grad[1] = torch.inf  # this step is skipped
            scaler.step(optimizer)
            scaler.update()
        results.append(values(model))
        assert min(adapter.get_last_factors().values()) < 1
    assert furthest(*results) <= 1e-7


def test_pauses_missing_gradients_and_broken_rows() -> None:
    model, first, twin, second, adapter = pair()
    with adapter.paused():
        for one, optimizer in ((model, first), (twin, second)):
            backward(one)
            optimizer.step()
    assert_same_bits(values(model), values(twin))
    for one in (model, twin):
        backward(one, 1)
        one[0].weight.grad[2, 0, 0, 0] = torch.nan
        one[2].weight.grad = one[3].weight.grad = None
    for p, f in zip(twin.parameters(), [None] * 20, strict=False):
        assert f is None
        if p.grad is not None:
            (factor,) = by_hand_of(twin, p)
            p.grad = p.grad * factor.nan_to_num(1)
    first.step()
    second.step()
    for own, wanted in zip(values(model), values(twin), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-13, equal_nan=True)
    assert model[0].weight.isnan().sum() == 1
    factors = adapter.get_last_factors()
    assert factors["2.weight"] == factors["3.weight"] == 1 > factors["0.weight"]


def by_hand_of(model: nn.Module, p: Any) -> list[Tensor]:
    dimension = dimension_of(model, p)
    return [of_agc(0.3)(norm(p.grad, dimension), norm(p, dimension))]


def test_excluded_layers_keep_their_bits() -> None:
    model, first, twin, second, adapter = pair(exclude=["0.*", "7.weight"])
    for one in (model, twin):
        backward(one)
    first.step()
    second.step()
    for name in ("0.weight", "0.bias", "7.weight"):
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))
        assert adapter.get_last_factors()[name] == 1
    assert not torch.equal(model[6].weight, twin[6].weight)
    everything = layerwise.LayerwiseLR(second, AGC(), twin, layers="unit", exclude=["*"])
    backward(twin)
    second.step()
    assert set(everything.get_last_factors().values()) == {1.0}


def test_bounds_and_chains() -> None:
    model, first, twin, second, adapter = pair(chain(AGC(0.3), AGC(0.2)), bounds=(0.5, 0.9))
    backward(model)
    backward(twin)
    with torch.no_grad():
        for p, f, g in zip(twin.parameters(), by_hand(twin, of_agc(0.3)), by_hand(twin, of_agc(0.2)), strict=True):
            p.grad *= (f * g).clamp(0.5, 0.9)
    first.step()
    second.step()
    assert furthest(values(model), values(twin)) <= 1e-13
    saved = adapter.state_dict()
    assert saved["layers"] == [name for name, _ in model.named_parameters()]
    adapter.load_state_dict(saved)


@pytest.mark.parametrize("other", ["unit", "parameter", "split", "update"])
def test_factors_of_two_adapters_multiply(other: str) -> None:
    model, twin = network(), network()
    first, second = (optim.SGD(m.parameters(), lr=0.01) for m in (model, twin))
    place: Any = "update" if other == "update" else "gradient"
    rule = LayerAdaptive()
    layerwise.LayerwiseLR(first, rule, model, layers="unit", apply=place)
    if other in ("unit", "update"):
        layerwise.LayerwiseLR(first, rule, model, layers="unit", apply=place)
    else:
        split = {"0.weight": 2} if other == "split" else None
        layerwise.LayerwiseLR(first, Constant({"*": 2.0}), model, layers="parameter", apply="gradient", split=split)
    backward(model)
    backward(twin)
    with torch.no_grad():
        for p, f in zip(twin.parameters(), by_hand(twin, of_layer_adaptive), strict=True):
            p.grad *= f * (f if other in ("unit", "update") else 2.0)
    first.step()
    second.step()
    assert furthest(values(model), values(twin)) <= 1e-13


@pytest.mark.parametrize("first", ["unit", "parameter"])
def test_the_order_of_two_adapters_is_nothing_to_weight_decay(first: str) -> None:
    """LayerAdaptive multiplies the decay too, AGC does not: f₁ (f₂ g + λw)."""
    model, twin = network(), network()
    options: Any = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.5}
    optimizer, by_torch = optim.SGD(model.parameters(), **options), optim.SGD(twin.parameters(), **options)
    for layers in (first, "parameter" if first == "unit" else "unit"):
        rule = LayerAdaptive() if layers == "unit" else AGC(0.01)
        layerwise.LayerwiseLR(optimizer, rule, model, layers=layers, exclude=None)
    backward(model)
    backward(twin)
    with torch.no_grad():
        for p, f in zip(twin.parameters(), by_hand(twin, of_layer_adaptive), strict=True):
            clip = min(1.0, 0.01 * max(float(p.norm()), 1e-3) / float(p.grad.norm()))
            p.grad = f * (clip * p.grad + 0.5 * p)
    by_torch.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    by_torch.step()
    assert furthest(values(model), values(twin)) <= 1e-13


def test_without_a_model_units_are_refused() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    optimizer = optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"which dimension of '0.weight' its outputs are; pass the model"):
        layerwise.LayerwiseLR(optimizer, AGC(), layers="unit")
    layerwise.LayerwiseLR(optimizer, AGC(), model, layers="unit")


def test_a_parameter_that_comes_later() -> None:
    model, first, twin, second, adapter = pair()
    for one, optimizer in ((model, first), (twin, second)):
        one.append(nn.Linear(2, 3).double())
        optimizer.add_param_group({"params": list(one[-1].parameters())})
    twin[-1].load_state_dict(model[-1].state_dict())
    backward(model)
    backward(twin)
    clipped(twin)
    first.step()
    second.step()
    assert furthest(values(model), values(twin)) <= 1e-13
    assert "8.weight" in adapter.get_last_factors()


def test_parameters_without_values() -> None:
    model = nn.Linear(3, 2, device="meta")
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="hold no values"):
        adapter = layerwise.LayerwiseLR(optimizer, AGC(), model, layers="unit")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert adapter.get_last_factors() == {"weight": 1, "bias": 1}


def test_only_vectors_and_no_rows() -> None:
    model = nn.ParameterDict({"a": torch.ones(4), "b": torch.ones(()), "c": torch.ones(0, 3)})
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, AGC(0.1), model, layers="unit")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert adapter.get_last_factors() == pytest.approx({"a": 0.1, "b": 0.1, "c": 1.0})


def test_monitor_records_the_mean_of_rows() -> None:
    model, first, _, _, adapter = pair()
    monitor = layerwise.Monitor(first, model, every=1)
    backward(model)
    first.step()
    record = monitor.get_last_record()
    assert record is not None
    assert dict(zip(record.layers, record.factor, strict=True)) == pytest.approx(adapter.get_last_factors())
    assert record.lr == pytest.approx(list(adapter.get_last_lr().values()))


def test_non_finite_gradients_can_raise() -> None:
    model, first, *_ = pair(on_nonfinite="raise")
    backward(model)
    model[0].weight.grad[1, 0, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=re.escape("'0.weight'")):
        first.step()


# --- On an accelerator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_a_device_launches_three_kernels_a_parameter_and_reads_nothing(place: Any) -> None:
    """Of fake tensors no value can be read."""

    def launches(count: int, rule: Any) -> int:
        with FakeTensorMode():
            model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(count)))
            for layer in model:
                layer.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
            optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
            if rule is not None:
                layerwise.LayerwiseLR(optimizer, rule, model, layers="unit", apply=place)
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.empty_like(p)
                with Launches() as watching:
                    optimizer.step()
        return watching.count

    rule = AGC() if place == "gradient" else Floor
    few, many = (launches(count, rule) - launches(count, None) for count in (10, 30))
    assert (many - few) / 20 == 3
    assert few - 10 * 3 <= MOST


@pytest.mark.parametrize("rule", [AGC(0.3), LayerAdaptive(), Floor], ids=repr)
def test_steps_without_reading_are_the_same(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[list[Tensor]] = []
    for reads in (True, False):
        if not reads:
            original = UnitFactors.__init__

            def keep(self: UnitFactors, raw: Tensor, statistics: Any, original: Any = original) -> None:
                original(self, raw, statistics)
                self._changed = [i for i, count in enumerate(statistics.counts) if count]
                self.neutral = False

            monkeypatch.setattr(UnitFactors, "__init__", keep)
        model = network()
        optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
        layerwise.LayerwiseLR(optimizer, rule, model, layers="unit", exclude=["0.weight"])
        for step in range(3):
            backward(model, step)
            optimizer.step()
        results.append(values(model))
    assert furthest(*results) <= 1e-13


# --- What is refused --------------------------------------------------------------------------------------------------


def attach(model: nn.Module, rule: Any = None, **arguments: Any) -> layerwise.LayerwiseLR:
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return layerwise.LayerwiseLR(optimizer, AGC() if rule is None else rule, model, **{"layers": "unit", **arguments})


@pytest.mark.parametrize(
    "rule",
    [
        LARS(),
        LARC(),
        Trust(),
        Constant({"*": 2.0}),
        refresh(AGC(), every=2),
        UpdateClip(),
        chain(LayerAdaptive(), Constant({"*": 2.0})),
    ],
    ids=repr,
)
def test_rules_that_need_more_than_a_row_are_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match="use layers='parameter', or a rule such as AGC, LayerAdaptive or UpdateFloor"):
        attach(nn.Linear(2, 2), rule)
    attach(nn.Linear(2, 2), rule, layers="parameter")
    for other in (AGC(), LayerAdaptive(), UpdateFloor(), chain(AGC(), AGC(0.1)), bounds(AGC(), 0.1, 1)):
        attach(nn.Linear(2, 2), other)


def test_a_mean_over_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="use layers='parameter'"):
        attach(nn.Linear(2, 2), normalize="mean")
    attach(nn.Linear(2, 2), normalize="mean", layers="parameter")


def test_the_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="use apply='gradient' or apply='update', or use layers='parameter'"):
        attach(nn.Linear(2, 2), LayerAdaptive(), apply="lr")
    for arguments in ({"apply": "gradient"}, {"apply": "update"}, {"apply": "lr", "layers": "parameter"}):
        attach(nn.Linear(2, 2), LayerAdaptive(), **arguments)


def test_split_is_refused() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        attach(nn.Linear(2, 2), split={"weight": 2})
    attach(nn.Linear(2, 2), split={"weight": 2}, layers="parameter")


def test_zero_is_refused() -> None:
    optimizer = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layers='unit' does not work with .*; use layers='parameter'"):
        check_rows(optimizer, SimpleNamespace(), AGC(), "gradient", "gradient", units=True)


class Quantised(nn.Parameter):
    """As of torchao."""

    def dequantize(self) -> Tensor:
        return self.detach().as_subclass(Tensor)


class Sharded(nn.Parameter):
    """As a DTensor."""

    def to_local(self) -> Tensor:
        return self.detach().as_subclass(Tensor)[:1]


@pytest.mark.parametrize("kind", ["class", "sharded", "float8", "groups"])
def test_parameters_whose_rows_cannot_be_measured_are_refused(kind: str) -> None:
    model = nn.ModuleDict({"a": nn.ConvTranspose1d(4, 4, 3, groups=2), "b": nn.Linear(2, 2)})
    words = "2 groups"
    if kind == "class":
        model["a"] = nn.Linear(2, 2)
        model["a"].weight = Quantised(torch.ones(2, 2))
        words = "is a quantised Quantised"
    elif kind == "sharded":
        model["a"] = nn.Linear(2, 2)
        model["a"].weight = Sharded(torch.ones(2, 2))
        words = "is sharded"
    elif kind == "float8":
        model["a"] = nn.Linear(2, 2)
        model["a"].weight = nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
        words = "float8"
    with pytest.raises(ValueError, match=re.escape("'a.weight'") + f".*{words}"):
        attach(model)
    attach(model, layers="parameter")
    attach(model, exclude=["a.weight"])


def test_sparse_gradients_are_refused_before_the_step() -> None:
    for sparse, exclude in ((True, None), (True, ["weight"]), (False, None)):
        model = nn.Embedding(6, 2, sparse=sparse)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        layerwise.LayerwiseLR(optimizer, AGC(), model, layers="unit", exclude=exclude)
        model(torch.tensor([1])).sum().backward()
        before = model.weight.detach().clone()
        if sparse and exclude is None:
            with pytest.raises(ValueError, match=re.escape("sparse=False in its module, or exclude=['weight']")):
                optimizer.step()
            assert torch.equal(model.weight, before)
        else:
            optimizer.step()
            assert not torch.equal(model.weight, before)


def test_where_there_are_no_units() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    unknown: Any = "unit"
    with pytest.raises(ValueError, match=re.escape("'module', 'parameter', in LayerwiseLR 'unit'")):
        layerwise.Monitor(optimizer, model, layers=unknown)
    with pytest.raises(ValueError, match="in LayerwiseLR 'unit'"):
        layerwise.param_groups(model, layers=unknown)
    layerwise.Monitor(optimizer, model, layers="parameter").detach()
    layerwise.param_groups(model, layers="parameter")

    class ByUnit(AGC):
        default_layers = "unit"

    with pytest.raises(ValueError, match="default_layers='parameter', or use LayerwiseLR"):
        layerwise.step_in_backward(optimizer, model, ByUnit())
    assert "units" in repr(layerwise.LayerwiseLR(optimizer, ByUnit(), model))
    other = nn.Linear(2, 2)
    layerwise.step_in_backward(optim.SGD(other.parameters(), lr=0.1), other, AGC()).detach()


def test_diagnose_names_rows_and_what_they_cost() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    text = layerwise.diagnose(optimizer, model, AGC(), layers="unit")
    assert "route     the gradients are multiplied in place" in text
    assert "1 pass over the gradients that have a factor other than 1" in text
    assert "28 rows have a factor each" in text
    text = layerwise.diagnose(optim.AdamW(model.parameters()), model, layers="unit")
    assert "because   a parameter has one rate, so factors of its rows act beside it" in text
    assert "interpolation" in text
