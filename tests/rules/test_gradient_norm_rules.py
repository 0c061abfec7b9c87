"""Rules of gradient and weight norms: NovoGrad, normalised gradients, clipping, steps by the weights' size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer
from layerwise.rules import AGC, AdaGC, LayerMoment, NormalizedGradient, WeightScaled
from layerwise.statistics import Statistics

from .test_finished_step import backward, furthest, network, train

CPU = torch.device("cpu")


def statistics(*norms: float, **others: Any) -> Statistics:
    return Statistics(gradient_norm=torch.tensor(norms, dtype=torch.float64), **others)


def layers(count: int) -> list[Layer]:
    return [Layer(str(i), (torch.zeros(4),)) for i in range(count)]


def test_layer_moment_on_sgd_is_novograd() -> None:
    novograd: Any = pytest.importorskip("pytorch_optimizer").NovoGrad
    model, alike = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.95, weight_decay=0.001)
    LayerwiseLR(optimizer, LayerMoment(), model)
    theirs = novograd(alike.parameters(), lr=0.01, betas=(0.95, 0.98), weight_decay=0.001, weight_decouple=False)
    assert furthest(train(model, optimizer), train(alike, theirs)) <= 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_layer_moment_over_steps(corrected: bool) -> None:
    rule = LayerMoment(0.9, bias_correction=corrected)
    state = rule.init(layers(2), CPU)
    norms = [2.0, 1.0, 3.0, 0.5]
    for step, expected in enumerate(reference.layer_moment(norms, 0.9, corrected=corrected)):
        factors, state = rule.factors(statistics(norms[step], 7.0, counts=torch.tensor(True)), state)
        assert float(factors[0]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("gradient", [0.0, math.nan, math.inf])
def test_layer_moment_does_not_count_a_step_without_a_gradient(gradient: float) -> None:
    rule, counts = LayerMoment(), torch.tensor(True)
    state = rule.init(layers(1), CPU)
    factors, state = rule.factors(statistics(gradient, counts=counts), state)
    assert factors.item() == 1
    factors, state = rule.factors(statistics(2.0, counts=counts), state)
    before = {name: value.clone() for name, value in state.items()}
    factors, state = rule.factors(statistics(gradient, counts=counts), state)
    assert factors.item() == pytest.approx(0.5, rel=1e-7)
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_a_normalised_gradient_has_the_norm_that_was_asked_for(norm: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    LayerwiseLR(optimizer, NormalizedGradient(norm), model)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    steps = [(p.detach() - old) / 0.5 for p, old in zip(model.parameters(), before, strict=True)]
    for weight, bias in (steps[:2], steps[2:4], steps[4:]):
        both = torch.cat([weight.flatten(), bias.flatten()])
        size = both.norm() if norm == "l2" else both.square().mean().sqrt()
        assert float(size) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("rule", [NormalizedGradient(), LayerMoment()], ids=repr)
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "Rprop"])
def test_where_the_size_of_the_gradient_is_divided_out_it_is_refused(rule: Any, optimizer: str) -> None:
    model = network()
    made = getattr(torch.optim, optimizer)(model.parameters())
    with pytest.raises(ValueError, match="use SGD, or a rule that scales the rate, or pass apply='gradient'"):
        LayerwiseLR(made, rule, model)
    assert LayerwiseLR(made, rule, model, apply="gradient").apply == "gradient"
    assert LayerwiseLR(torch.optim.SGD(model.parameters()), rule, model).apply in ("gradient", "lr")


def test_ada_gc_over_steps() -> None:
    norms = [[0.5, 2.0], [0.2, 1.0], [0.4, 1.5], [3.0, 0.1], [0.1, 4.0]]
    rule = AdaGC(1.05, 0.9, 1.5, 2)
    state = rule.init(layers(2), CPU)
    for own, expected in zip(norms, reference.ada_gc(norms, 1.05, 0.9, 1.5, 2), strict=True):
        factors, state = rule.factors(statistics(*own, counts=torch.tensor(True)), state)
        assert factors.tolist() == pytest.approx(expected, rel=1e-14)
    kept = state["average"].clone()
    _, state = rule.factors(statistics(math.inf, 1.0, counts=torch.tensor(False)), state)
    assert torch.equal(state["average"], kept)
    assert state["steps"] == 5


def test_ada_gc_leaves_excluded_and_broken_layers_out_of_the_global_norm() -> None:
    three = [*layers(2), Layer("2", (torch.zeros(4),), included=False)]
    rule = AdaGC(absolute=1.0)
    state = rule.init(three, CPU)
    factors, state = rule.factors(statistics(3.0, 4.0, 100.0, counts=torch.tensor(True)), state)
    assert factors[:2].tolist() == pytest.approx([0.2, 0.2], rel=1e-14)
    assert state["average"][:2].tolist() == pytest.approx([0.6, 0.8], rel=1e-14)
    for broken in (math.inf, math.nan):
        factors, _ = rule.factors(statistics(2.0, broken, 1.0, counts=torch.tensor(False)), rule.init(three, CPU))
        assert factors[:2].tolist() == [0.5, 1.0]


def test_ada_gc_on_adam_is_that_of_pytorch_optimizer() -> None:
    theirs: Any = pytest.importorskip("pytorch_optimizer").AdaGC
    model, alike = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    LayerwiseLR(optimizer, AdaGC(warmup=5), model)
    other = theirs(alike.parameters(), lr=0.01, betas=(0.9, 0.999), beta=0.98, lambda_abs=1.0, lambda_rel=1.05,
                   warmup_steps=5, weight_decay=0.1, eps=1e-8)  # fmt: skip
    assert furthest(train(model, optimizer, 30), train(alike, other, 30)) <= 1e-6


def test_agc_is_that_of_a_formula_and_leaves_small_gradients_alone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    adapter = LayerwiseLR(optimizer, AGC(0.2), model, apply="gradient")
    backward(model, 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    expected = reference.agc([[g.numpy()] for g in gradients], [[w.numpy()] for w in weights], 0.2)
    assert list(adapter.get_last_factors().values()) == pytest.approx(list(expected), rel=1e-12)
    assert min(expected) < 1 == max(expected)


def test_clipping_acts_on_the_gradient_of_any_optimizer_without_a_remark(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    adapter = LayerwiseLR(torch.optim.AdamW(model.parameters()), AdaGC(), model)
    assert adapter.apply == "gradient"
    assert not caplog.records
    named = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    LayerwiseLR(torch.optim.SGD(named.parameters(), lr=0.1), AGC(), named)
    assert "exclude=['head.weight', …]" in caplog.text


@pytest.mark.parametrize("make", [lambda: AGC(0), lambda: AGC(eps=-1), lambda: AdaGC(beta=1), lambda: AdaGC(warmup=0),
                                  lambda: AdaGC(absolute=math.inf), lambda: LayerMoment(1), lambda: LayerMoment(eps=-1),
                                  lambda: NormalizedGradient("l1"), lambda: WeightScaled(2, 1),
                                  lambda: WeightScaled(-1)])  # fmt: skip
def test_arguments_out_of_their_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|unknown"):
        make()


def test_weight_scaled_steps_are_in_proportion_to_the_weights() -> None:
    model = network()
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    adapter = LayerwiseLR(optimizer, WeightScaled(largest=0.3), model)
    weights = [[p.detach().numpy().copy()] for p in model.parameters()]
    backward(model, 0)
    optimizer.step()
    expected = reference.weight_scaled(weights, largest=0.3)
    assert list(adapter.get_last_factors().values()) == pytest.approx(list(expected), rel=1e-12)
    assert adapter.get_last_factors()["0.bias"] == 1e-3
    assert max(expected) == 0.3


# --- What wraps a rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["mean", "weighted", "harmonic", "max"])
def test_normalised_factors_have_the_mean_1(by: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, NormalizedGradient(), model, normalize=by, exclude=["2"])
    backward(model, 0)
    optimizer.step()
    factors = adapter.get_last_factors()
    assert factors.pop("2") == 1
    sizes = {"0": 42, "4": 0, "3": 24}
    own = list(factors.values())
    mean = {
        "mean": sum(own) / 2,
        "harmonic": 2 / sum(1 / f for f in own),
        "weighted": sum(sizes[name] * f for name, f in factors.items()) / 66,
        "max": max(own),
    }[by]
    assert mean == pytest.approx(1, rel=1e-12)
    assert len(set(own)) == 2


def test_a_normalised_rule_keeps_its_state_and_its_bounds() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, LayerMoment(), model, normalize="mean", bounds=(0.5, 1.2), apply="gradient")
    train(model, optimizer, 3)
    assert {0.5, 1.2} <= {*adapter.get_last_factors().values()}
    again = LayerwiseLR(
        torch.optim.SGD(model.parameters(), lr=0.1), LayerMoment(), model, normalize="mean", bounds=(0.5, 1.2),
        apply="gradient"
    )  # fmt: skip
    again.load_state_dict(adapter.state_dict())
    assert again.state_dict()["state"]["0"]["0"]["moment"].tolist() == (
        adapter.state_dict()["state"]["0"]["0"]["moment"].tolist()
    )
    with pytest.raises(ValueError, match="'mean', 'weighted', 'max', 'harmonic'"):
        LayerwiseLR(optimizer, LayerMoment(), model, normalize="median")


def test_refresh_holds_moves_and_smooths() -> None:
    rule = layerwise.rules.refresh(NormalizedGradient(), every=4, ramp=2, smooth=0.5)
    state = rule.init(layers(1), CPU)
    shown, asked = [], []
    for step in range(9):
        asked.append(rule.asks(state))
        norm = {0: 1.0, 1: 9.0, 2: 9.0, 4: 0.25, 8: 0.1}.get(step)  # at 1 and 2 for those without an answer
        factors, state = rule.factors(statistics(*([norm] if norm else [])), state)
        shown.append(factors.item())
    second = (0.5 * 1 + 1.0 * 4) / 1.5  # a moving average corrected for its beginning
    expected = [1, 1, 1, 1, 1 + (second - 1) / 3, 1 + 2 * (second - 1) / 3, second, second]
    assert shown[:8] == pytest.approx(expected, rel=1e-14)
    assert asked == [True, True, True, False, True, False, False, False, True]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 3, "ramp": 3}, {"every": 3, "smooth": 1}])
def test_arguments_of_refresh(arguments: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        layerwise.rules.refresh(NormalizedGradient(), **arguments)


# --- Names, and permanent groups --------------------------------------------------------------------------------------


def test_rules_by_name() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rule in ("layer_moment", "Layer-Moment", {"name": "LayerMoment"}, LayerMoment()):
        adapter = layerwise.attach(optimizer, rule, model, exclude=["3*"])
        assert adapter.rule == LayerMoment()
        adapter.detach()
    adapter = layerwise.attach(optimizer, "trust", model, calibrate=True, normalize="mean")
    assert repr(adapter.rule).startswith("normalized(Trust(calibrate=True")
    adapter.detach()
    adapter = layerwise.attach(optimizer, [{"name": "layer_decay", "decay": 0.5}, "layer_adaptive"], model)
    assert repr(adapter.rule).startswith("chain(LayerDecay(decay=0.5")


def test_wrong_names_and_arguments_say_what_there_is() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'lamb' is unknown; there are .*Trust"):
        layerwise.attach(optimizer, "lamb", model)
    with pytest.raises(ValueError, match=r"Did you mean 'LARS'\?$"):
        layerwise.attach(optimizer, "lasr", model)
    with pytest.raises(TypeError, match=r"attach a name with layerwise\.attach\(optimizer, 'lars', model\)"):
        layerwise.LayerwiseLR(optimizer, "lars", model)
    with pytest.raises(ValueError, match=r"LARS\(.*unexpected keyword argument 'trust'"):
        layerwise.attach(optimizer, "lars", model, trust=3)
    with pytest.raises(ValueError, match=r"missing a required argument: 'decay'"):
        layerwise.attach(optimizer, "layer_decay", model)
    with pytest.raises(TypeError, match="this one is made already"):
        layerwise.attach(optimizer, LayerMoment(), model, beta=0.5)
    with pytest.raises(TypeError, match="must hold the rule's name"):
        layerwise.attach(optimizer, {"decay": 0.5}, model)


def test_every_rule_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    layerwise.rules.list()
    text = capsys.readouterr().out
    for name in layerwise.rules.by_name.every_rule():
        assert f"\n{name}(" in f"\n{text}"
    assert "    needs weight_norm, direction_norm; acts on update\n" in text


def test_layer_decay_as_groups_is_the_adapter_to_the_bit() -> None:
    decay = layerwise.rules.LayerDecay(0.5, depth=lambda name: int(name))
    model, alike = network(), network()
    groups = layerwise.param_groups(model, decay, lr=0.01, weight_decay=0.1)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("lr x 0.125", 0.1), ("lr x 0.125, no decay", 0.0), ("lr x 0.5, no decay", 0.0),
        ("lr x 1", 0.1), ("lr x 1, no decay", 0.0),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    by_hand = [
        {"params": [p for p in alike.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in alike.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(by_hand, lr=0.01)
    LayerwiseLR(theirs, decay, alike)
    for step in range(10):
        for net, each in ((model, optimizer), (alike, theirs)):
            backward(net, step)
            each.step()
    assert all(map(torch.equal, model.parameters(), alike.parameters()))


def test_groups_without_a_rule_are_those_of_before() -> None:
    model = network()
    assert [group["name"] for group in layerwise.param_groups(model)] == ["0", "2", "3"]
    assert layerwise.param_groups(model, "parameter") == layerwise.param_groups(model, layers="parameter")
    assert [g["name"] for g in layerwise.param_groups(model, ["0*", "*"])] == ["0*", "*"]
    with pytest.raises(ValueError, match="are for the groups of a rule"):
        layerwise.param_groups(model, lr=0.1)


def test_which_parameters_have_no_decay() -> None:
    model = network()
    rule = layerwise.rules.Constant({"*": 1.0})

    def bare(**arguments: Any) -> list[str]:
        groups = layerwise.param_groups(model, rule, lr=0.1, weight_decay=0.1, **arguments)
        return [name for group in groups if not group["weight_decay"] for name in group["param_names"]]

    assert bare() == ["0.bias", "2.weight", "2.bias", "3.bias"]
    assert bare(no_decay=None) == []
    assert bare(no_decay=["0*"]) == ["0.weight", "0.bias"]
    assert bare(no_decay=lambda name, p: name == "3.weight") == ["3.weight"]
    with pytest.raises(ValueError, match="matches none of"):
        bare(no_decay=["9*"])
    with pytest.raises(TypeError, match="patterns, or a callable"):
        bare(no_decay=3)


@pytest.mark.parametrize("rule", [LayerMoment(), AGC(), layerwise.rules.LARS(), layerwise.rules.Trust()], ids=repr)
def test_rules_whose_factors_change_are_refused(rule: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match="attach it with LayerwiseLR"):
        layerwise.param_groups(model, rule, lr=0.1)
    with pytest.raises(ValueError, match="must be the rate"):
        layerwise.param_groups(model, layerwise.rules.LayerDecay(0.5))


def test_a_layer_without_an_answer_is_asked_for_again_and_others_keep_theirs() -> None:
    rule = layerwise.rules.refresh(NormalizedGradient(), every=100)
    state = rule.init(layers(2), CPU)
    for norms, expected in (([0.5, math.inf], [2, 1]), ([0.25, 0.1], [2, 10]), ([0.2, 0.2], [2, 10])):
        own = torch.tensor(norms, dtype=torch.float64)
        own = torch.where(own < math.inf, own, math.nan)
        factors, state = rule.factors(statistics(*own.tolist()), state)
        assert factors.tolist() == pytest.approx(expected)


def test_what_wraps_a_rule_keeps_its_state_through_files_epochs_and_new_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfreezing = layerwise.rules.Unfreezing()
    for rule in (layerwise.rules.refresh(unfreezing, 1), layerwise.rules.bounds(unfreezing, 0, 9)):
        adapter = LayerwiseLR(optimizer, rule, model)
        assert adapter.counts_epochs
        adapter.end_epoch()
        saved = adapter.state_dict()
        adapter.detach()
        again = LayerwiseLR(optimizer, rule, model)
        again.load_state_dict(saved)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert again.get_last_factors() == {"0": 0.0, "1": 1.0, "2": 1.0}
        again.detach()
    bounded = LayerwiseLR(optimizer, layerwise.rules.LDoG(), model, bounds=(0, 100))
    optimizer.step()
    first = {name: value.clone() for name, value in bounded.state_dict()["state"]["0"]["copies"].items()}
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.step()
    later = bounded.state_dict()["state"]["0"]["copies"]
    assert all(torch.equal(later[name], value) for name, value in first.items())


def test_layers_without_a_step_do_not_count_in_the_mean() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    for frozen in (False, True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adapter = LayerwiseLR(optimizer, layerwise.rules.LARS(), model, normalize="mean")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if frozen:
            model[2].weight.grad = None
        optimizer.step()
        factors = list(adapter.get_last_factors().values())[: 2 if frozen else 3]
        assert sum(factors) / len(factors) == pytest.approx(1, rel=1e-12)
        adapter.detach()


def test_a_chain_that_would_lose_a_rule_under_adam_is_refused() -> None:
    model = network()
    rule = layerwise.rules.chain(layerwise.rules.LayerDecay(0.1), AGC())
    with pytest.raises(ValueError, match="Attach each of its rules by itself"):
        LayerwiseLR(torch.optim.AdamW(model.parameters()), rule, model)


def test_stepping_in_backward_takes_the_place_of_the_rule() -> None:
    results = []
    for inside in (True, False):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if inside:
            attached: Any = layerwise.step_in_backward(optimizer, model, AGC())
        else:
            attached = LayerwiseLR(optimizer, AGC(), model)
        for step in range(3):
            backward(model, step)
            optimizer.step()
        attached.detach()
        results.append([p.detach().clone() for p in model.parameters()])
    assert furthest(*results) <= 1e-14


def test_an_argument_of_both_is_the_rules() -> None:
    model = network()
    adapter = layerwise.attach(torch.optim.AdamW(model.parameters()), "layer_decay", model, decay=0.75)
    assert repr(adapter.rule).startswith("LayerDecay(decay=0.75")
