"""Networks whose parameters' names hide which module each belongs to."""

from __future__ import annotations

import math
import re
import warnings
from functools import reduce

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARS, Constant, LayerAdaptive, LayerDecay


def attach(model, rule=None, layers="auto", named=False):
    held = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.SGD(held, lr=0.1)
    return layerwise.LayerwiseLR(optimizer, rule or LayerAdaptive(), None if named else model, layers=layers), optimizer


def shapes():
    torch.manual_seed(0)
    return {"dense/kernel": (4, 8), "dense/bias": (8,), "dense_1/kernel": (8, 1), "dense_1/bias": (1,)}


class Paths(nn.Module):
    """Keeps all parameters in one dictionary whose keys are paths, as Keras does."""

    def __init__(self):
        super().__init__()
        self._torch_params = nn.ParameterDict({name: torch.randn(shape) / 2 for name, shape in shapes().items()})

    def forward(self, x):
        held = self._torch_params
        x = torch.tanh(x @ held["dense/kernel"] + held["dense/bias"])
        return x @ held["dense_1/kernel"] + held["dense_1/bias"]


class Wrapper(nn.Module):
    """Keeps a Keras network under a name of its own, as its Sequential does."""

    def __init__(self, name):
        super().__init__()
        setattr(self, name, Paths())

    def forward(self, x):
        (inner,) = self.children()
        return inner(x)


NETWORKS = {
    "keras": (Paths, ""),
    "keras sequential": (lambda: Wrapper("_functional"), ""),
    "keras in a sequence": (lambda: nn.Sequential(Paths()), "0."),
    "compiled": (lambda: torch.compile(Paths(), backend="eager"), ""),
}


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
@pytest.mark.parametrize(("make", "prefix"), NETWORKS.values(), ids=NETWORKS)
def test_paths_give_the_layers_and_each_its_factor(make, prefix, named):
    model = make()
    adapter, optimizer = attach(model, named=named)
    assert adapter.layers == [f"{prefix}dense", f"{prefix}dense_1"]
    model(torch.ones(3, 4)).square().sum().backward()
    norms = {}
    for name, p in model.named_parameters():
        layer = name.rpartition("/")[0].rpartition(".")[2]
        norms[layer] = norms.get(layer, 0.0) + p.grad.double().square().sum().item()
    optimizer.step()
    expected = {f"{prefix}{name}": 1 + math.log1p(1 / math.sqrt(total)) for name, total in norms.items()}
    assert adapter.get_last_factors() == pytest.approx(expected, rel=1e-6)


def test_paths_can_be_patterns():
    assert attach(Paths(), layers=["dense", "dense_1/*"])[0].layers == ["dense", "dense_1/*"]
    assert attach(Paths(), Constant({"dense_1": 2.0}))[0].layers == ["dense", "dense_1"]


def test_layer_decay_says_that_paths_in_alphabetical_order_tell_no_depth():
    with pytest.warns(UserWarning, match="alphabetical order"):
        attach(Paths(), LayerDecay(0.5))


def test_a_keras_network_has_its_layers(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(1)])
    assert [name.partition("/")[0] for name in attach(model)[0].layers] == ["sequential", "sequential"]


class Opacus(nn.Module):
    """Names the wrapped network `_module`, as Opacus' GradSampleModule does."""

    def __init__(self, module):
        super().__init__()
        self._module = module


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
def test_the_prefix_of_opacus_is_left_out(named):
    bare = nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(3, 1), nn.Linear(3, 2))
    for wrapped in (Opacus(bare), nn.DataParallel(Opacus(bare)), Opacus(torch.compile(bare, backend="eager"))):
        assert attach(wrapped, named=named)[0].layers == ["0", "1", "2"]
    inside = nn.Sequential(Opacus(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert attach(inside, named=named)[0].layers == ["0", "1"]


class Raw(nn.Module):
    """Owns the parameters of several layers itself."""

    def __init__(self):
        super().__init__()
        for i in (1, 2):
            self.register_parameter(f"w{i}", nn.Parameter(torch.ones(3, 3)))
            self.register_parameter(f"b{i}", nn.Parameter(torch.ones(3)))


def underscored(make=dict):
    names = ("conv1_weight", "conv1_bias", "conv1_norm_weight", "fc_weight", "fc_bias", "scale")
    return nn.ParameterDict(make({name: torch.ones(3, 3) if "weight" in name else torch.ones(3) for name in names}))


FLAT = {
    "underscores": (underscored, 4),
    "a list": (lambda: nn.ParameterList([torch.ones(3, 3), torch.ones(3), torch.ones(3, 3), torch.ones(3)]), 4),
    "two matrices": (lambda: nn.ParameterList([torch.ones(3, 3), torch.ones(3, 3)]), 2),
    "parameters of the network itself": (Raw, 4),
    "wrapped": (lambda: nn.DataParallel(Raw()), 4),
}


def remedy(message):
    return eval(re.search(r"Pass layers=(\[.*?\]|'parameter'),", message)[1])


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
@pytest.mark.parametrize(("make", "count"), FLAT.values(), ids=FLAT)
def test_all_parameters_in_one_layer_give_a_warning_whose_remedy_works(make, count, named):
    model = make()
    total = len(list(model.parameters()))
    with pytest.warns(UserWarning, match=f"all {total} parameters are one layer") as caught:
        attach(model, named=named)
    assert [warning.filename for warning in caught] == [__file__]
    adapter, _ = attach(model, layers=remedy(str(caught[0].message)), named=named)
    assert len(adapter.layers) == count
    assert sum(len(layer.parameters) for layer in adapter.layer_table()) == total
    assert attach(model, layers=["*"], named=named)[0].layers == ["*"]


def test_patterns_of_underscored_names_keep_weight_and_bias_together():
    model = underscored()
    with pytest.warns(UserWarning, match="one layer") as caught:
        attach(model)
    layers = attach(model, layers=remedy(str(caught[0].message)))[0].layer_table()
    assert {layer.name: sorted(layer.parameter_names) for layer in layers} == {
        "conv1_*": ["conv1_bias", "conv1_weight"],
        "conv1_norm_*": ["conv1_norm_weight"],
        "fc_*": ["fc_bias", "fc_weight"],
        "scale": ["scale"],
    }


def test_an_underscored_dictionary_beside_other_layers_warns_as_well():
    model = nn.ModuleDict({"held": underscored(), "attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match="all 6 parameters of 'held' are one layer") as caught:
        attach(model)
    adapter, _ = attach(model, layers=remedy(str(caught[0].message)))
    assert len(adapter.layers) == 6
    assert sum(len(layer.parameters) for layer in adapter.layer_table()) == 12
    assert len(attach(model, layers=["held.*", "attention.*", "head"])[0].layers) == 3


SINGLE = {
    "linear": lambda: nn.Linear(3, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "recurrent": lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "normalised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "a weight and a bias": lambda: nn.ParameterDict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}),
    "two networks": lambda: nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
}


@pytest.mark.parametrize("named", [False, True], ids=["model", "names of the optimizer"])
@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE)
def test_a_single_layer_gives_no_warning(make, named):
    attach(make(), named=named)


def test_monitors_groups_and_steps_in_backward_warn_as_well():
    model = Raw()

    def optimizer():
        return torch.optim.SGD(model.parameters(), lr=0.1)

    for call in (
        lambda: layerwise.Monitor(optimizer(), model),
        lambda: layerwise.param_groups(model),
        lambda: layerwise.step_in_backward(optimizer(), model, Constant({"*": 1.0})),
    ):
        with pytest.warns(UserWarning, match="all 4 parameters are one layer") as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_rules_of_parameters_and_steps_give_no_warning():
    model = Raw()
    attach(model, LARS())
    with pytest.warns(UserWarning, match="one layer"):
        _, optimizer = attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layerwise.Monitor(optimizer, model)  # whose layers are the adapter's
        reduce(torch.add, [p.sum() for p in model.parameters()]).backward()
        optimizer.step()


def test_diagnose_calls_it_a_problem():
    model = Raw()
    text = layerwise.diagnose(torch.optim.SGD(model.parameters(), lr=0.1), model, seconds=0)
    assert "problem   all 4 parameters are one layer" in text
    assert "problems  none found" not in text
