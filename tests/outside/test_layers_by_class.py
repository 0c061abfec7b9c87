"""Modules whose class says that they are one layer with the modules below them."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import layerwise
from layerwise.rules import BackMatching, Constant, LayerAdaptive, LayerDecay

MessagePassing = type("MessagePassing", (nn.Module,), {"__module__": "torch_geometric.nn.conv.message_passing"})
"""What the convolutions of PyTorch Geometric inherit from."""


class GraphConvolution(MessagePassing):
    """Holds its bias itself and its weight in a child, like PyTorch Geometric's GCNConv."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return self.lin(x) + self.bias


class GraphIsomorphism(MessagePassing):
    """Holds a network of several layers, like PyTorch Geometric's GINConv."""

    def __init__(self, network):
        super().__init__()
        self.nn = network
        self.eps = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.nn((1 + self.eps) * x)


class GraphNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = GraphConvolution(3, 4)
        self.second = GraphConvolution(4, 2)

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Gated(nn.Module):
    """Owns a parameter beside a child with parameters; nothing says whether they are one layer."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.gate * self.lin(x)


def attach(model, rule=None, layers="auto", named=False):
    held = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.SGD(held, lr=0.1)
    return layerwise.LayerwiseLR(optimizer, rule or LayerAdaptive(), None if named else model, layers=layers), optimizer


def names_in(adapter):
    return {layer.name: sorted(layer.parameter_names) for layer in adapter.layer_table()}


ATTENTION = ["in_proj_bias", "in_proj_weight", "out_proj.bias", "out_proj.weight"]


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
def test_multihead_attention_is_one_layer(named):
    assert names_in(attach(nn.MultiheadAttention(4, 2), named=named)[0]) == {"": ATTENTION}
    other_widths = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True, bias=False)})
    assert attach(other_widths, named=named)[0].layers == ["a"]


def test_its_factor_comes_from_one_norm_over_all_its_parameters():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2)
    adapter, optimizer = attach(model)
    x = torch.randn(3, 2, 4)
    model(x, x, x)[0].square().sum().backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    optimizer.step()
    assert adapter.get_last_factors() == pytest.approx({"": 1 + math.log1p(1 / norm)}, rel=1e-6)


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
def test_each_attention_of_a_transformer_is_one_layer(named):
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    block = "decoder.layers.0"
    layers = [f"encoder.layers.0.{name}" for name in ("self_attn", "linear1", "linear2", "norm1", "norm2")]
    layers += ["encoder.norm", f"{block}.self_attn", f"{block}.multihead_attn"]
    layers += [f"{block}.{name}" for name in ("linear1", "linear2", "norm1", "norm2", "norm3")]
    assert attach(model, named=named)[0].layers == [*layers, "decoder.norm"]


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), model[1]),
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(4, 2), lambda: GraphConvolution(4, 4)])
def test_wrappers_keep_it_one_layer(wrap, make):
    model = nn.Sequential(make(), nn.Linear(4, 1))
    assert attach(wrap(model))[0].layers == ["0", "1"]


def test_parametrized_projections_stay_in_the_layer():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), GraphConvolution(4, 4))
    parametrizations.weight_norm(model[0].out_proj)
    parametrizations.orthogonal(model[1].lin)
    adapter, _ = attach(model)
    assert adapter.layers == ["0", "1"]
    assert len(names_in(adapter)["0"]) == 5


def test_only_a_part_that_is_trained_keeps_the_layers_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    optimizer = torch.optim.SGD(model["attention"].out_proj.parameters(), lr=0.1)
    assert layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model).layers == ["attention"]


def test_a_graph_convolution_is_one_layer_and_its_bias_shares_the_factor():
    torch.manual_seed(0)
    model = GraphNetwork()
    adapter, optimizer = attach(model, LayerDecay(0.5))
    model(torch.randn(5, 3)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert adapter.get_last_factors() == {"first": 0.5, "second": 1.0}
    for p, old, gradient, factor in zip(model.parameters(), before, gradients, (0.5, 0.5, 1, 1), strict=True):
        torch.testing.assert_close(p, old - 0.1 * factor * gradient)


def test_a_graph_convolution_with_a_network_inside_is_one_layer():
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    model = nn.ModuleDict({"convolution": GraphIsomorphism(inner), "head": nn.Linear(4, 2)})
    assert attach(model)[0].layers == ["convolution", "head"]


def test_patterns_are_the_layers_names_or_divide_them():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "graph": GraphConvolution(4, 2)})
    names = names_in(attach(model)[0])
    assert names_in(attach(model, layers=["attention", "graph"])[0]) == names
    parts = names_in(attach(model, layers=["attention", "attention.out_proj", "graph.lin", "graph"])[0])
    assert parts["attention"] == ["attention.in_proj_bias", "attention.in_proj_weight"]
    assert parts["graph.lin"] == ["graph.lin.weight"]


def test_a_class_of_that_name_in_another_package_says_nothing():
    class MessagePassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.bias = nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(2))

    assert attach(nn.ModuleDict({"a": MessagePassing()}))[0].layers == ["a", "a.lin"]


def test_the_convolutions_of_pytorch_geometric_are_one_layer_each():
    conv = pytest.importorskip("torch_geometric.nn.conv")
    model = nn.ModuleList([conv.GCNConv(3, 4), conv.GATConv(4, 4, heads=2), conv.SAGEConv(8, 2)])
    assert attach(model, LayerDecay(0.5))[0].layers == ["0", "1", "2"]


def test_adapters_inside_an_attention_stay_layers_of_their_own():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attention"]))
    layers = attach(wrapped)[0].layers
    base = "base_model.model.attention"
    adapters = [f"{part}.lora_{which}.default" for part in (base, f"{base}.base_layer.out_proj") for which in "AB"]
    assert sorted(name for name in layers if "lora" in name) == sorted(adapters)
    assert [name for name in layers if "lora" not in name] == [f"{base}.base_layer", "base_model.model.head"]


def test_back_matching_reads_the_width_of_the_whole_layer():
    """For n inputs, ‖W‖² / n of the layer above, and 1/2 for the activation between; attention vectors are no W."""

    class Attention(GraphConvolution):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            del self.lin
            self.att_src = nn.Parameter(torch.zeros(1, 2, outputs))
            self.lin = nn.Linear(inputs, outputs, bias=False)

    torch.manual_seed(0)
    model = nn.Sequential(Attention(3, 5), Attention(5, 2))
    adapter, optimizer = attach(model, BackMatching())
    model(torch.randn(5, 3)).square().sum().backward()
    gain = model[1].lin.weight.detach().double().square().sum().item() / 5 / 2
    optimizer.step()
    assert adapter.get_last_factors() == pytest.approx({"0": 1 / gain, "1": 1.0}, rel=1e-6)


def test_the_state_of_two_layers_is_refused_and_loads_with_two_layers():
    old = {"layers": ["", "out_proj"]}
    model = nn.MultiheadAttention(4, 2)
    by_owner, _ = attach(model, layers=lambda name, parameter: name.rpartition(".")[0])
    state = by_owner.state_dict()
    assert state["layers"] == old["layers"]
    with pytest.raises(ValueError, match=r"saved for the layers \['', 'out_proj'\], this adapter has \[''\]"):
        attach(nn.MultiheadAttention(4, 2))[0].load_state_dict(state)
    again, _ = attach(nn.MultiheadAttention(4, 2), layers=lambda name, parameter: name.rpartition(".")[0])
    again.load_state_dict(state)


def test_groups_and_monitors_have_the_same_layers():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "graph": GraphConvolution(4, 2)})
    assert [group["name"] for group in layerwise.param_groups(model)] == ["attention", "graph"]
    assert layerwise.Monitor(torch.optim.SGD(model.parameters(), lr=0.1), model).layers == ["attention", "graph"]
    handle = layerwise.step_in_backward(torch.optim.SGD(model.parameters(), lr=0.1), model, Constant({"*": 0.5}))
    assert handle.layers == ["attention", "graph"]


def advice(text):
    """Return the value of the `layers=` that diagnose prints."""
    return eval(re.search(r"layers=(\[.*?\]|lambda .*?) (?:joins|join) them", text)[1])


def test_diagnose_names_other_modules_that_own_parameters_beside_children(capsys):
    model = nn.Sequential(Gated(), nn.ReLU(), nn.Linear(4, 4), Gated())
    text = layerwise.diagnose(torch.optim.SGD(model.parameters(), lr=0.1), model, seconds=0)
    assert "'0' owns gate, beside 0.lin" in text
    assert "'3' owns gate, beside 3.lin" in text
    adapter, _ = attach(model, layers=advice(text))
    assert names_in(adapter) == {
        "0.*": ["0.gate", "0.lin.bias", "0.lin.weight"],
        "2": ["2.bias", "2.weight"],
        "3.*": ["3.gate", "3.lin.bias", "3.lin.weight"],
    }


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
def test_the_printed_patterns_join_a_root_module(named):
    model = Gated()
    optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.1)
    text = layerwise.diagnose(optimizer, None if named else model, seconds=0)
    assert names_in(attach(model, layers=advice(text))[0]) == {"*": ["gate", "lin.bias", "lin.weight"]}


def test_the_printed_patterns_join_nested_modules_each():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner, self.lin = nn.Parameter(torch.ones(4)), Gated(), nn.Linear(4, 4)

    model = nn.ModuleDict({"blocks[0]": Outer(), "head": nn.Linear(4, 2)})
    text = layerwise.diagnose(torch.optim.SGD(model.parameters(), lr=0.1), model, seconds=0)
    groups = list(names_in(attach(model, layers=advice(text))[0]).values())
    inner = [f"blocks[0].inner.{name}" for name in ("gate", "lin.bias", "lin.weight")]
    outer = [f"blocks[0].{name}" for name in ("lin.bias", "lin.weight", "scale")]
    assert sorted(groups) == sorted([inner, outer, ["head.bias", "head.weight"]])


def test_the_printed_function_joins_many_modules():
    model = nn.Sequential(*(Gated() for _ in range(30)), *(nn.Linear(4, 4) for _ in range(30)))
    text = layerwise.diagnose(torch.optim.SGD(model.parameters(), lr=0.1), model, seconds=0)
    adapter, _ = attach(model, layers=advice(text))
    assert len(adapter.layers) == 60
    assert sum(len(names) == 3 for names in names_in(adapter).values()) == 30


def test_diagnose_says_nothing_of_modules_that_are_whole():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), GraphConvolution(4, 4), nn.Linear(4, 2), nn.LSTM(2, 2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert " owns " not in layerwise.diagnose(optimizer, model, seconds=0)
    model = nn.Sequential(Gated())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert " owns " not in layerwise.diagnose(optimizer, model, seconds=0, layers="parameter")
    assert " owns " not in layerwise.diagnose(optimizer, model, seconds=0, layers=["0.*"])
