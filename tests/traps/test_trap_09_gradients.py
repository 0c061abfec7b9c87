"""Trap 9: gradients that are zero, missing, sparse, complex, not finite, of half precision, or kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARS, Constant, LayerAdaptive

every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])
KINDS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "plain descent": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def norm_of(module):
    return math.sqrt(sum(p.grad.to_dense().double().square().sum().item() for p in module.parameters()))


@every_place
@every_kind
def test_a_zero_gradient_gives_factor_one_and_no_nan(apply, kind, make_model, backward, weights, assert_same_bits):
    model, bare = make_model(), make_model()
    optimizer, alone = kind(model.parameters()), kind(bare.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    for network, stepped in ((model, optimizer), (bare, alone)):
        for step in range(2):
            backward(network, step)
            for p in network.parameters():
                p.grad.zero_()
            stepped.step()
    assert adapter.get_last_factors() == {"0": 1.0, "2": 1.0, "4": 1.0}
    assert_same_bits(weights(model), weights(bare))
    assert all(p.isfinite().all() for p in model.parameters())


@every_place
@every_kind
@pytest.mark.parametrize("rule", [LayerAdaptive(), LARS()], ids=["layer-adaptive", "LARS"])
def test_a_missing_gradient_leaves_its_layer_alone_and_it_may_come_back(
    apply, kind, rule, make_model, backward, weights
):
    model = make_model()
    optimizer = kind(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply=apply, layers="module", exclude=None)
    for step, missing in enumerate(("2", None, "0", "2")):
        backward(model, step)
        for p in model[int(missing)].parameters() if missing else ():
            p.grad = None
        before = weights(model)
        optimizer.step()
        factors = adapter.get_last_factors()
        for name, value in weights(model).items():
            layer = name.partition(".")[0]
            assert torch.equal(value, before[name]) == (layer == missing)
            assert (factors[layer] == 1.0) == (layer == missing)


@every_place
@every_kind
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_gradient_stays_in_its_layer(apply, kind, value, make_model, backward, weights, assert_same_bits):
    networks = []
    for broken in (False, True):
        model = make_model()
        optimizer = kind(model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
        backward(model)
        if broken:
            model[2].weight.grad[0, 0] = value
        optimizer.step()
        networks.append(weights(model))
    sound, after = networks
    assert adapter.get_last_factors()["2"] == 1.0
    assert all(f > 1 for name, f in adapter.get_last_factors().items() if name != "2")
    assert not after["2.weight"][0, 0].isfinite()
    assert after["2.weight"].isfinite().sum() == after["2.weight"].numel() - 1
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        assert_same_bits(after[name], sound[name])


@pytest.fixture
def checked_sparse_tensors():
    """Adagrad warns when nobody has chosen whether sparse tensors are checked."""
    with torch.sparse.check_sparse_tensor_invariants():
        yield


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embed = nn.Embedding(6, 3, sparse=sparse)
        self.head = nn.Linear(3, 1)

    def loss(self, step):
        words = torch.tensor([[1, 4, 1], [2, 2, 5], [0, 1, 2]])[step % 3]
        return self.head(self.embed(words)).square().sum() * (1 + step)


@every_place
@pytest.mark.parametrize(
    "kind",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    ],
    ids=["momentum", "plain descent", "Adagrad"],
)
def test_a_sparse_gradient_acts_as_the_dense_one(apply, kind, weights, assert_close, checked_sparse_tensors):
    networks = []
    for sparse in (True, False):
        torch.manual_seed(3)
        model = Words(sparse).double()
        optimizer = kind(model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
        for step in range(4):
            optimizer.zero_grad()
            model.loss(step).backward()
            assert model.embed.weight.grad.is_sparse == sparse
            expected = {n: 1 + math.log1p(1 / norm_of(m)) for n, m in model.named_children()}
            optimizer.step()
            assert adapter.get_last_factors() == pytest.approx(expected, rel=1e-12)
        networks.append(weights(model))
    assert_close(*networks)


@every_place
@every_kind
def test_a_complex_parameter_acts_as_its_pair_of_reals(apply, kind, assert_close):
    start, pull = (torch.randn(4, 3, dtype=torch.complex128) for _ in range(2))
    ends = []
    for as_complex in (True, False):
        p = nn.Parameter(start.clone() if as_complex else torch.view_as_real(start).clone())
        optimizer = kind([("weight", p)])
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), apply=apply)
        for step in range(3):
            gradient = pull * (step + 1)
            p.grad = gradient if as_complex else torch.view_as_real(gradient).clone()
            norm = math.sqrt(gradient.abs().square().sum().item())
            optimizer.step()
            assert adapter.get_last_factors() == pytest.approx({"": 1 + math.log1p(1 / norm)}, rel=1e-12)
        ends.append(torch.view_as_real(p.detach()) if as_complex else p.detach())
    assert_close(*ends)


@every_place
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_neither_overflow_nor_lose_their_factor(apply, dtype):
    model = nn.ModuleDict({"large": nn.Linear(1000, 1, bias=False), "small": nn.Linear(10, 1, bias=False)}).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-16, momentum=0.9)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    model["large"].weight.grad = torch.full_like(model["large"].weight, 3e4)
    model["small"].weight.grad = torch.full_like(model["small"].weight, 1e-2)
    expected = {name: 1 + math.log1p(1 / norm_of(model[name])) for name in model}
    optimizer.step()
    assert adapter.get_last_factors() == pytest.approx(expected, rel=1e-6)
    assert all(p.isfinite().all() for p in model.parameters())


@every_place
def test_frozen_layers_stay_and_have_factor_one(apply, make_model, train, weights, assert_same_bits):
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    before = weights(model)
    train(model, optimizer, 2)
    assert adapter.get_last_factors()["0"] == 1.0
    assert_same_bits(weights(model)["0.weight"], before["0.weight"])
    model[0].requires_grad_(True)
    train(model, optimizer, 1, first=2)
    assert adapter.get_last_factors()["0"] > 1
    assert not torch.equal(model[0].weight, before["0.weight"])


@every_place
@pytest.mark.parametrize("named", [False, True], ids=["by the model", "by the optimizer's names"])
def test_parameters_added_later_are_layers_from_then_on(apply, named, make_model, train, weights, assert_same_bits):
    networks = []
    for attached_late in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.02, momentum=0.9)
        source = None if named else model
        adapter = None if attached_late else layerwise.LayerwiseLR(optimizer, LayerAdaptive(), source, apply=apply)
        torch.manual_seed(5)
        model.append(nn.Linear(2, 2).double())
        optimizer.add_param_group({"params": list(model[5].named_parameters("5")), "lr": 0.01})
        if attached_late:
            adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), source, apply=apply)
        train(model, optimizer)
        assert adapter.layers == ["0", "2", "4", "5"]
        assert adapter.get_last_factors()["5"] > 1
        assert adapter.get_last_lr()["5"] == 0.01 * adapter.get_last_factors()["5"]
        networks.append(weights(model))
    assert_same_bits(*networks)


def test_a_parameter_of_no_layer_added_later_keeps_its_own_rate(setup, train):
    model, optimizer, adapter = setup(Constant({"*": 3.0}))
    stranger = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [stranger], "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0})
    stranger.grad = torch.ones_like(stranger)
    train(model, optimizer, 1)
    assert stranger.tolist() == [0.5, 0.5]
    assert adapter.get_last_factors() == {"0": 3.0, "2": 3.0, "4": 3.0}


@pytest.mark.parametrize("decay", ["scaled", "plain"])
def test_an_explicit_gradient_place_leaves_the_gradient_scaled_as_clipping_does(decay, setup, backward):
    model, optimizer, adapter = setup(LayerAdaptive(), apply="gradient", decay=decay)
    backward(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name] * adapter.get_last_factors()[name.partition(".")[0]])


@pytest.mark.parametrize("apply", ["auto", "lr", "update"])
def test_other_places_leave_the_gradient_so_that_it_may_be_kept_for_the_next_step(apply, setup, backward):
    model, optimizer, adapter = setup(LayerAdaptive(), apply=apply)
    assert adapter.apply == ("gradient" if apply == "auto" else apply)
    backward(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    factors = []
    for _ in range(3):
        optimizer.step()
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
        factors.append(adapter.get_last_factors())
    assert factors[0] == factors[1] == factors[2]
