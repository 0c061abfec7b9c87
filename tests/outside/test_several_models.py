"""Lists and dictionaries of modules as the model, and bare tensors as layers."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARS, Constant, LayerAdaptive


def critic():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def optimizer_of(*models):
    return torch.optim.SGD(itertools.chain(*(model.parameters() for model in models)), lr=0.1)


FORMS = {
    "list": (lambda a, b: [a, b], ["0.0", "0.2", "1.0", "1.2"]),
    "tuple": (lambda a, b: (a, b), ["0.0", "0.2", "1.0", "1.2"]),
    "dict": (lambda a, b: {"q1": a, "q2": b}, ["q1.0", "q1.2", "q2.0", "q2.2"]),
    "names of methods": (lambda a, b: {"forward": a, "keys": b}, ["forward.0", "forward.2", "keys.0", "keys.2"]),
    "nested": (lambda a, b: {"critics": [a, b]}, [f"critics.{i}.{j}" for i in (0, 1) for j in (0, 2)]),
    "wrapped": (lambda a, b: [nn.DataParallel(a), torch.compile(b, backend="eager")], ["0.0", "0.2", "1.0", "1.2"]),
    "module list": (lambda a, b: nn.ModuleList([a, b]), ["0.0", "0.2", "1.0", "1.2"]),
}


@pytest.mark.parametrize(("form", "names"), FORMS.values(), ids=FORMS)
def test_every_entry_takes_lists_and_dictionaries_of_modules(form, names, capsys):
    a, b = critic(), critic()
    assert layerwise.Monitor(optimizer_of(a, b), form(a, b)).layers == names
    assert layerwise.step_in_backward(optimizer_of(a, b), form(a, b), Constant({"*": 1.0})).layers == names
    a, b = critic(), critic()
    assert [group["name"] for group in layerwise.param_groups(form(a, b))] == names
    text = layerwise.diagnose(optimizer_of(a, b), form(a, b), seconds=0)
    assert [line.split()[0] for line in text.splitlines()[3:7]] == names
    assert "problems  none found" in text
    adapter = layerwise.LayerwiseLR(optimizer_of(a, b), LayerAdaptive(), form(a, b), on_nonfinite="raise")
    assert adapter.layers == names


def test_each_module_gets_its_own_factors():
    torch.manual_seed(0)
    a, b = critic(), critic()
    optimizer = optimizer_of(a, b)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"q1.*": 2.0, "q2.0": 0.0}), {"q1": a, "q2": b})
    x = torch.randn(5, 3)
    (a(x) - b(x)).sum().backward()
    before = copy.deepcopy([p.detach() for model in (a, b) for p in model.parameters()])
    gradients = [p.grad.clone() for model in (a, b) for p in model.parameters()]
    optimizer.step()
    after = [p for model in (a, b) for p in model.parameters()]
    for factor, old, gradient, new in zip([2, 2, 2, 2, 0, 0, 1, 1], before, gradients, after, strict=True):
        torch.testing.assert_close(new, old - 0.1 * factor * gradient)
    again = layerwise.LayerwiseLR(optimizer_of(a, b), adapter.rule, {"q1": a, "q2": b})
    again.load_state_dict(adapter.state_dict())


WRONG_MODELS = {
    "a string": ("network", TypeError, "a list or dict of modules, as torch.nn.ModuleList"),
    "a generator": ((m for m in [critic()]), TypeError, "not generator"),
    "none inside": ([critic(), None], TypeError, r"model\['1'\] must be a torch.nn.Module"),
    "a tensor": (torch.ones(2), TypeError, r"name bare tensors with layers=\{'name': \[tensor\]\}"),
    "a tensor inside": ({"a": critic(), "b": torch.ones(2)}, TypeError, r"model\['b'\] is a tensor"),
    "an empty list": ([], ValueError, "holds no module"),
    "an empty dict": ({}, ValueError, "holds no module"),
    "a number as key": ({1: critic()}, TypeError, "the key 1"),
    "a dot in a key": ({"a.b": critic()}, TypeError, "the key 'a.b'"),
}


@pytest.mark.parametrize(("model", "error", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_what_is_no_module_is_refused(model, error, message):
    optimizer = optimizer_of(critic())
    with pytest.raises(error, match=message):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    with pytest.raises(error, match=message):
        layerwise.Monitor(optimizer, model)


def test_a_bare_tensor_is_a_layer_by_name():
    log_alpha = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_alpha], lr=0.1)
    layers = {"log_alpha": [log_alpha]}
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), layers=layers)
    monitor = layerwise.Monitor(optimizer, every=1, layers=layers)
    (log_alpha * torch.tensor([3.0, 4.0])).sum().backward()
    optimizer.step()
    factor = 1 + math.log1p(1 / 5)
    assert adapter.get_last_factors() == pytest.approx({"log_alpha": factor}, rel=1e-12)
    torch.testing.assert_close(log_alpha.detach(), torch.tensor([-0.3, -0.4], dtype=torch.float64) * factor)
    assert monitor.get_last_record().layers == ("log_alpha",)


def test_the_error_without_names_names_the_remedy():
    tensor = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([tensor])
    with pytest.raises(ValueError, match=re.escape("layers={'name': [tensor]}")):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive())
    assert layerwise.LayerwiseLR(optimizer, LayerAdaptive(), layers={"name": [tensor]}).layers == ["name"]


def test_tensors_of_modules_and_bare_ones_make_layers_together():
    actor, log_alpha = critic(), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([*actor.parameters(), log_alpha])
    layers = {"actor": actor.parameters(), "log_alpha": (log_alpha,)}
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), layers=layers, exclude=None)
    names = {layer.name: layer.parameter_names for layer in adapter.layer_table()}
    assert names == {"actor": tuple(f"actor.{i}" for i in range(4)), "log_alpha": ("log_alpha",)}
    adapter.detach()
    part = {"first": [actor[0].weight, actor[0].bias], "log_alpha": [log_alpha]}
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), actor, layers=part)
    first, bare = adapter.layer_table()
    assert first.parameter_names == ("0.weight", "0.bias")
    assert first.module is actor[0]
    assert bare.parameter_names == ("log_alpha",)
    assert "2 parameters in no layer" in repr(adapter)


def test_diagnose_describes_bare_tensors(capsys):
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    layers = {"a": iter([a]), "b": [b]}
    text = layerwise.diagnose(optimizer, rule=Constant({"a": 2.0}), layers=layers)
    assert "2 layers, 2 parameter tensors, 5 numbers" in text
    assert "at most 2 in place of 1" in text
    assert torch.equal(a, torch.ones(3))


def test_groups_are_made_from_tensors_by_name():
    model = critic()
    groups = layerwise.param_groups(model, {"all": model.parameters()})
    assert [(group["name"], len(group["params"])) for group in groups] == [("all", 4)]
    with pytest.raises(ValueError, match="not among the model's parameters that require a gradient"):
        layerwise.param_groups(model, {"other": [torch.ones(2, requires_grad=True)]})
    with pytest.raises(ValueError, match="leaves out"):
        layerwise.param_groups(model, {"first": [model[0].weight]})


def test_layers_of_tensors_last_while_groups_come():
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([a], lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"a": 2.0}), layers={"a": [a]})
    optimizer.add_param_group({"params": [b]})
    (a.sum() + b.sum()).backward()
    optimizer.step()
    assert adapter.get_last_factors() == {"a": 2.0}
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.8))
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.9))


A, B = (torch.ones(3, requires_grad=True) for _ in "ab")
WRONG_LAYERS = {
    "no layer": ({}, ValueError, r"layers=\{\} names no layer"),
    "no tensor": ({"a": []}, ValueError, r"layers\['a'\] holds no tensor"),
    "a tensor for a list": ({"a": A}, TypeError, r"pass a list of tensors: \[tensor\]"),
    "a number for a list": ({"a": 3}, TypeError, r"layers\['a'\] is a int"),
    "a string for a list": ({"a": "weight"}, TypeError, r"layers\['a'\] holds str, not tensors"),
    "pairs for tensors": ({"a": [("a", A)]}, TypeError, r"holds tuple, not tensors; parameters\(\) gives these"),
    "a number for a name": ({1: [A]}, TypeError, "names of layers are strings"),
    "a tensor in two layers": ({"a": [A], "b": [B, A]}, ValueError, r"in layers\['a'\] and layers\['b'\]"),
    "a tensor twice": ({"a": [A, A]}, ValueError, r"in layers\['a'\] and layers\['a'\]"),
    "a tensor of no optimizer": (
        {"a": [A], "b": [torch.ones(7)]},
        ValueError,
        r"layers\['b'\] holds a tensor of shape \(7,\) that is not among the 2 parameters of this optimizer",
    ),
}


@pytest.mark.parametrize(("layers", "error", "message"), WRONG_LAYERS.values(), ids=WRONG_LAYERS)
def test_wrong_layers_of_tensors_are_refused(layers, error, message):
    optimizer = torch.optim.SGD([A, B], lr=0.1)
    with pytest.raises(error, match=message):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), layers=layers)
    with pytest.raises(error, match=message):
        layerwise.Monitor(optimizer, layers=layers)
    assert not optimizer._optimizer_step_pre_hooks
