"""Frozen parameters that hold integers, float8 numbers or quantised weights, beside trainable ones."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARC, LARS, BackMatching, Constant, LayerAdaptive

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int64, torch.bool)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
RULES = {
    "LARS": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, LARS(), model),
    "LARS on the update": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, LARS(), model, apply="update"),
    "LARS in tensors": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, LARS(), model, bounds=(0, 1)),
    "LARC": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, LARC(), model),
    "LayerAdaptive": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model),
    "BackMatching": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, BackMatching(), model, bounds=(0.1, 10)),
    "raise": lambda model, optimizer: layerwise.LayerwiseLR(optimizer, LARS(), model, on_nonfinite="raise"),
}


def make_model(dtype=None, size=6):
    """Return a network whose middle layer has a frozen weight of this type."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, size), nn.Tanh(), nn.Linear(size, size), nn.Linear(size, 2))
    if dtype is not None:
        frozen = torch.linspace(-3, 3, size * size).reshape(size, size)
        model[2].weight = nn.Parameter(frozen.to(dtype), requires_grad=False)
    return model


def make_optimizer(model, *, every=True):
    parameters = model.parameters() if every else [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        optimizer.step()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_trainable_layers_train_as_without_frozen_integers(name, dtype):
    alone = make_model(dtype)
    optimizer = make_optimizer(alone, every=False)
    reference = RULES[name](alone, optimizer)
    expected, factors = train(alone, optimizer), reference.get_last_factors()
    model = make_model(dtype)
    optimizer = make_optimizer(model)
    with pytest.warns(UserWarning, match=rf"1 of the optimizer's parameters .*2\.weight \({dtype}\)") as caught:
        adapter = RULES[name](model, optimizer)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(map(torch.equal, train(model, optimizer), expected))
    assert adapter.get_last_factors() == factors


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("name", [name for name in RULES if name != "BackMatching"])
def test_trainable_layers_train_as_without_frozen_float8(name, dtype):
    alone, model = make_model(dtype), make_model(dtype)
    optimizers = make_optimizer(alone, every=False), make_optimizer(model)
    reference, adapter = RULES[name](alone, optimizers[0]), RULES[name](model, optimizers[1])
    assert all(map(torch.equal, train(model, optimizers[1]), train(alone, optimizers[0])))
    factors = adapter.get_last_factors()
    assert {layer: factors[layer] for layer in reference.get_last_factors()} == reference.get_last_factors()


def test_lars_beside_integers_gives_the_factor_of_its_formula():
    model = make_model(torch.uint8)
    optimizer = make_optimizer(model)
    with pytest.warns(UserWarning, match="no floating-point numbers"):
        adapter = layerwise.LayerwiseLR(optimizer, LARS(trust_coefficient=0.02, eps=0), model)
    weight = model[3].weight
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    norm = math.sqrt(float(weight.detach().double().square().sum()))
    optimizer.step()
    expected = 0.02 * norm / (math.sqrt(weight.numel()) + 0.01 * norm)
    assert adapter.get_last_factors()["3.weight"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [6, 150, 600])
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_weights_are_measured_as_the_numbers_that_they_are(dtype, size):
    model = make_model(dtype, size)
    optimizer = make_optimizer(model)
    monitor = layerwise.Monitor(optimizer, model, every=1, layers="parameter")
    exact = math.sqrt(float(model[2].weight.detach().float().double().square().sum()))
    train(model, optimizer, steps=1)
    record = monitor.get_last_record()
    assert record is not None
    position = record.layers.index("2.weight")
    assert record.weight_norm[position] == pytest.approx(exact, rel=1e-6)
    assert record.update_norm[position] == 0
    assert all(record.update_norm[i] > 0 for i in range(len(record.layers)) if i != position)


class Doubling(torch.optim.Optimizer):
    """Doubles every weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(p.float() * 2)


def test_a_monitor_sees_how_far_float8_weights_move():
    model = make_model(torch.float8_e4m3fn, 600)
    optimizer = Doubling(model.parameters())
    monitor = layerwise.Monitor(optimizer, model, every=1, layers="parameter")
    exact = math.sqrt(float(model[2].weight.detach().float().double().square().sum()))
    optimizer.step()
    record = monitor.get_last_record()
    assert record is not None
    assert record.update_norm[record.layers.index("2.weight")] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_monitor_leaves_integers_out(dtype):
    model = make_model(dtype)
    optimizer = make_optimizer(model)
    with pytest.warns(UserWarning, match="no floating-point numbers"):
        monitor = layerwise.Monitor(optimizer, model, every=1)
    bias = float(model[2].bias.detach().double().norm())
    train(model, optimizer, steps=1)
    record = monitor.get_last_record()
    assert record is not None
    assert record.layers == ("0", "2", "3")
    assert record.weight_norm[1] == pytest.approx(bias, rel=1e-6)


def test_a_monitor_beside_an_adapter_does_not_warn_again():
    model = make_model(torch.int8)
    optimizer = make_optimizer(model)
    with pytest.warns(UserWarning, match="no floating-point numbers"):
        layerwise.LayerwiseLR(optimizer, LARS(), model)
    layerwise.Monitor(optimizer, model, every=1)
    train(model, optimizer)


def test_integers_outside_of_the_optimizer_are_no_matter():
    model = make_model(torch.uint8)
    optimizer = make_optimizer(model, every=False)
    layerwise.LayerwiseLR(optimizer, LARS(), model)
    layerwise.Monitor(optimizer, model, every=1)
    train(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_layers_step_in_backward_beside_quantised_weights(dtype):
    class Quantised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.float(), self.bias)

    def build(every):
        model = make_model(dtype)
        model[2].__class__ = Quantised
        return model, make_optimizer(model, every=every)

    def run(model, optimizer):
        for _ in range(2):
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters() if p.requires_grad]

    alone, optimizer = build(every=False)
    layerwise.LayerwiseLR(optimizer, LARS(), alone)
    expected = run(alone, optimizer)
    model, optimizer = build(every=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layerwise.step_in_backward(optimizer, model, LARS())
    assert all(map(torch.equal, run(model, optimizer), expected))


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOAT8], ids=str)
def test_diagnose_describes_quantised_weights(dtype, capsys):
    model = make_model(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layerwise.diagnose(make_optimizer(model), model, LARS())
    text = capsys.readouterr().out
    assert "problems  none found" in text
    assert ("1 parameter tensor of integers (quantised weights) in no layer" in text) == (dtype in INTEGERS)


def test_weights_that_are_quantised_after_attaching_count_as_zero():
    model = make_model()
    model[2].weight.requires_grad_(False)
    optimizer = make_optimizer(model)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    train(model, optimizer, steps=1)
    model[2].weight.data = torch.ones(18, 2, dtype=torch.uint8)
    train(model, optimizer, steps=1)
    assert adapter.get_last_factors()["2.weight"] == 1
    record = monitor.get_last_record()
    assert record is not None
    assert record.step == 2
    assert record.weight_norm[record.layers.index("2.weight")] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_pattern_of_integers_alone_is_refused():
    model = make_model(torch.uint8)
    with pytest.raises(ValueError, match="puts no parameter into a layer"):
        layerwise.LayerwiseLR(make_optimizer(model), Constant({"*": 2.0}), model, layers=["2.weight"])


@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_layer_of_bitsandbytes_with_adapters_trains():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    base.load_state_dict({"weight": torch.randn(64, 64)})
    model = nn.ModuleDict({"base": base.to("cpu"), "down": nn.Linear(64, 4), "up": nn.Linear(4, 64)})
    assert base.weight.dtype is torch.uint8
    optimizer = make_optimizer(model)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    monitor = layerwise.Monitor(optimizer, model, every=1, layers="module")
    train(model, optimizer)
    assert monitor.layers == ["down", "up"]
    assert 0 < adapter.get_last_factors()["up.weight"] < 1


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_of_torchao_is_measured_as_its_numbers():
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model(size=32)
    quantised = nn.Sequential(model[2])
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    model[2] = quantised[0].requires_grad_(False)
    optimizer = make_optimizer(model)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    train(model, optimizer, steps=1)
    exact = float(model[2].weight.dequantize().double().norm())
    record = monitor.get_last_record()
    assert record is not None
    assert record.weight_norm[record.layers.index("2.weight")] == pytest.approx(exact, rel=1e-6)
    assert record.update_norm[record.layers.index("2.weight")] == 0
    assert adapter.get_last_factors()["2.weight"] == 1


def test_integers_in_a_list_of_modules_are_named():
    modules = [make_model(), make_model(torch.uint8)]
    for attach in (
        lambda optimizer: layerwise.LayerwiseLR(optimizer, LARS(), modules),
        lambda optimizer: layerwise.Monitor(optimizer, modules),
        lambda optimizer: layerwise.step_in_backward(optimizer, modules, LARS()),
    ):
        optimizer = torch.optim.SGD([p for model in modules for p in model.parameters()], lr=0.1)
        with pytest.warns(UserWarning, match=r"1\.2\.weight \(torch\.uint8\)"):
            attached = attach(optimizer)
        attached.detach()
