"""Rules with copies of older gradients or weights, and rates from the first gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer
from layerwise.rules import AdaLip, InitialSNR, LayerMoment, LDoG, NoiseAdaptive
from layerwise.sharding import Shard
from layerwise.statistics import Gradients, Statistics

from .test_finished_step import backward, furthest, network, train

CPU = torch.device("cpu")
Rows = list[list[float]]


def layers(count: int) -> list[Layer]:
    return [Layer(str(i), (torch.zeros(2, dtype=torch.float64),)) for i in range(count)]


def of(*gradients: list[float] | None, scale: float | None = None) -> Statistics:
    tensors = [None if g is None else torch.tensor(g, dtype=torch.float64) * (scale or 1) for g in gradients]
    own = [
        reference.gradient_moments([] if g is None else [np.array(g)], 2 if g is None else len(g)) for g in gradients
    ]
    norms = [reference.joint_norm([] if g is None else [np.array(g)]) for g in gradients]
    return Statistics(
        gradients=Gradients(tensors, None if scale is None else torch.tensor(scale)),
        gradient_norm=torch.tensor(norms, dtype=torch.float64),
        gradient_std=torch.tensor([deviation for _, deviation in own], dtype=torch.float64),
    )


def followed(rule: Any, steps: list[Statistics], count: int = 1) -> list[list[float]]:
    """The factors of successive steps."""
    state, shown = rule.init(layers(count), CPU), []
    for statistics in steps:
        factors, state = rule.factors(statistics, state)
        shown.append(factors.tolist())
    return shown


# --- L-DoG ------------------------------------------------------------------------------------------------------------


def test_l_dog_on_sgd_is_that_of_its_code() -> None:
    theirs: Any = pytest.importorskip("dog").LDoG
    model, alike = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    LayerwiseLR(optimizer, LDoG(1e-4), model)
    assert furthest(train(model, optimizer, 40), train(alike, theirs(alike.parameters(), reps_rel=1e-4), 40)) <= 1e-15


def test_l_dog_over_a_training_by_hand() -> None:
    model = network()
    weights: dict[str, list[np.ndarray]] = {name: [] for name, _ in model.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adapter = LayerwiseLR(optimizer, LDoG(1e-3), model)
    for step in range(30):
        backward(model, step)
        for name, p in model.named_parameters():
            weights[name].append(p.detach().numpy().copy())
            gradients[name].append(p.grad.numpy().copy())
        optimizer.step()
    for name, factor in adapter.get_last_factors().items():
        assert factor == pytest.approx(reference.l_dog(weights[name], gradients[name], 1e-3)[-1], rel=1e-13)


def test_the_distance_is_from_the_weights_at_the_first_step() -> None:
    model, loaded = network(), network()
    nn.init.ones_(loaded[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adapter = LayerwiseLR(optimizer, LDoG(), model)
    model.load_state_dict(loaded.state_dict())
    train(model, optimizer, 2)
    copies = adapter.state_dict()["state"]["copies"]
    assert torch.equal(copies["/0.weight"], torch.ones(7, 5))
    assert float((model[0].weight.detach() - 1).abs().max()) < 1e-4


def test_l_dog_keeps_1_without_a_gradient_and_ignores_what_is_not_finite() -> None:
    rule = LDoG(0.1, 0)
    state = rule.init(layers(2), CPU)
    shown = []
    for norms in ([0.0, 1.0], [2.0, math.nan], [math.inf, 1.0]):
        both = {"gradient_norm": torch.tensor(norms).double(), "weight_norm": torch.zeros(2).double()}
        factors, state = rule.factors(Statistics(**both, counts=torch.tensor(True)), state)
        shown.append(factors.tolist())
    assert shown == [pytest.approx(row) for row in ([1, 0.1], [0.05, 0.1], [0.05, 0.1 / 2**0.5])]


# --- AdaLip, and noise ------------------------------------------------------------------------------------------------


def test_ada_lip_at_three_steps() -> None:
    shown = followed(AdaLip(), [of([g, 0.0]) for g in (2.0, 1.0, 3.0)])
    assert [row[0] for row in shown] == pytest.approx([1, 1.0399999960000001, 0.9319999963], rel=1e-15)


def test_ada_lip_over_a_training_by_hand() -> None:
    model = network()
    gradients: dict[str, list[np.ndarray]] = {name: [] for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, AdaLip(0.7), model)
    for step in range(20):
        backward(model, step)
        for name, p in model.named_parameters():
            gradients[name].append(p.grad.numpy().copy())
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)  # the gradients' memory is used again
    for name, factor in adapter.get_last_factors().items():
        assert factor == pytest.approx(reference.ada_lip(gradients[name], 0.7)[-1], rel=1e-12)


@pytest.mark.parametrize("kind", [AdaLip(), NoiseAdaptive(within="all"), InitialSNR()], ids=repr)
def test_the_scale_of_a_gradient_scaler_may_change(kind: Any) -> None:
    plain = followed(kind, [of([2.0, 1.0], [1.0, 3.0]), of([1.0, 0.5], [4.0, 0.0])], 2)
    scaled = followed(kind, [of([2.0, 1.0], [1.0, 3.0], scale=64.0), of([1.0, 0.5], [4.0, 0.0], scale=32.0)], 2)
    assert scaled == plain


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    steps = [of([2.0, 0.0]), of([1.0, 0.0]), of([value, 0.0]), of([3.0, 0.0]), of([2.0, 0.0])]
    shown = [row[0] for row in followed(AdaLip(), steps)]
    assert shown[1] == shown[2] == shown[3]  # the step after it cannot compare either
    assert shown[4] == pytest.approx(0.8 * shown[3] + 0.2 * 3, rel=1e-7)
    rule = NoiseAdaptive(within="all")
    state = rule.init(layers(1), CPU)
    noise = []
    for statistics in steps:
        _, state = rule.factors(statistics, state)
        noise.append(float(state["noise"][0]))
    assert noise == pytest.approx([0, 0.1, 0.1, 0.1, 0.19], rel=1e-14)


def test_a_missing_gradient_counts_as_zero() -> None:
    missing, zero = (followed(AdaLip(), [of([2.0, 0.0]), one, of([3.0, 0.0])]) for one in (of(None), of([0.0, 0.0])))
    assert missing == zero


def test_noise_adaptive_compares_layers_of_a_group() -> None:
    shown = followed(
        NoiseAdaptive(beta=0, within="all"), [of(*[[0.0, 1.0]] * 3), of([0.0, 1.0], [3**0.5, 1.0], [8**0.5, 1.0])], 3
    )
    assert shown[0] == [1, 1, 1]
    assert shown[1] == pytest.approx([1, 0.7071067811865476, 0.5773502691896257], rel=1e-14)
    own = NoiseAdaptive(2.0, 0.5, within=lambda name: "a" if name == "0" else "b")
    gradients: list[Rows] = [[[1.0, 2.0], [0.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [1.0, 1.0], [5.0, 2.0]]]
    noise = [0.5 * sum((x - y) ** 2 for x, y in zip(*pair, strict=True)) for pair in zip(*gradients, strict=True)]
    assert followed(own, [of(*one) for one in gradients], 3)[1] == pytest.approx(
        reference.noise_adaptive(noise, 2.0, "abb"), rel=1e-14
    )
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = LayerwiseLR(optimizer, NoiseAdaptive(0.01), model)
    train(model, optimizer, 3)
    assert 0 < min(adapter.get_last_factors().values()) < 1 == max(adapter.get_last_factors().values())


def test_a_layer_without_a_difference_does_not_take_the_maximum() -> None:
    rule = NoiseAdaptive(beta=0, within="all")
    steps = [of(None, [0.0, 0.0], *[[0.0, 1.0]] * 2), of(None, [0.0, 0.0], [3**0.5, 1.0], [8**0.5, 1.0])]
    assert followed(rule, steps, 4)[1] == pytest.approx([1, 1, 1, (2 / 3) ** 0.5], rel=1e-14)
    # From its second gradient on it does; the first one is no difference.
    later = [*steps, of([5.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]), of([5.0, 1.0], None, *[[3**0.5, 1.0]] * 2)]
    assert followed(rule, later, 4)[2] == pytest.approx([1, 1, 1, (2 / 3) ** 0.5], rel=1e-14)
    assert followed(rule, later, 4)[3] == pytest.approx([1, 1, 0.5**0.5, 0.5**0.5], rel=1e-14)


def test_ada_lip_begins_with_a_layers_first_gradient() -> None:
    alone = followed(AdaLip(), [of([g, 0.0]) for g in (2.0, 1.0, 3.0)])
    assert followed(AdaLip(), [of(None), of(None), *(of([g, 0.0]) for g in (2.0, 1.0, 3.0))]) == [[1], [1], *alone]


# --- The first gradient -----------------------------------------------------------------------------------------------


def test_initial_snr_on_sgd_is_sgd_sai(capsys: pytest.CaptureFixture[str]) -> None:
    theirs: Any = pytest.importorskip("sgd_sai").SGD_sai
    model, alike = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, dampening=0.9)
    LayerwiseLR(optimizer, InitialSNR(), model)
    other = theirs(alike.parameters(), lr=0.001, weight_decay=0.0)
    assert furthest(train(model, optimizer, 20), train(alike, other, 20)) <= 1e-12


def test_initial_snr_is_nearly_a_rule_of_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    big = Layer("", (torch.zeros(100, 100),))
    rule, control = InitialSNR(), InitialSNR("sqrt_n")
    values = [1.0 * torch.randn(100, 100, generator=generator), torch.randn(100, 100, generator=generator) + 3]
    shown = []
    for gradient in values:
        both = {"gradient_norm": gradient.norm().view(1), "gradient_std": gradient.std().view(1)}
        factors, _ = rule.factors(Statistics(**both), rule.init([big], CPU))
        shown.append(float(factors[0]))
    assert control.init([big], CPU)["_factors"].tolist() == [100]
    assert shown == pytest.approx([100, 100 * 10**0.5], rel=0.02)


def test_initial_snr_stays_at_the_first_gradient_of_each_layer() -> None:
    rule = InitialSNR(within=3)
    state = rule.init(layers(4), CPU)
    steps = [of([3.0, 4.0], None, [math.nan, 1.0], None), of([1.0, 9.0], [0.0, 0.0], [3.0, 4.0], None)]
    steps += [of(*[[3.0, 4.0]] * 3, None), of(*[[5.0, 5.5]] * 4)]
    shown, asked = [], []
    for statistics in steps:
        asked.append(rule.asks(state))
        factors, state = rule.factors(statistics, state)
        shown.append(factors.tolist())
    one = 50**0.5
    rows = [[one, 1, 1, 1], [one, 1, one, 1], [one, one, one, 1], [one, one, one, 1]]
    assert shown == [pytest.approx(row, rel=1e-7) for row in rows]
    assert asked == [True, True, True, False]
    assert rule.factors(statistics, state)[0] is factors


def test_a_layer_that_comes_later_has_a_first_gradient_too() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}).double()
    optimizer = torch.optim.SGD(model["b"].parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, InitialSNR(within=2), model)
    for step in range(6):
        for p in model.parameters():
            p.grad = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64) + step * torch.eye(2)
        if step == 4:
            optimizer.add_param_group({"params": model["a"].parameters()})
        optimizer.step()
    first, later = ([[3.0, 4.0], [3.0, 4.0]], [[7.0, 4.0], [3.0, 8.0]])
    expected = reference.initial_snr([[np.array(one)] for one in (later, first)])
    assert list(adapter.get_last_factors().values()) == pytest.approx(list(expected), rel=1e-12)


def test_an_older_layers_steps_do_not_begin_again() -> None:
    rule = InitialSNR(within=1)
    _, state = rule.factors(of(None), rule.init(layers(1), CPU))
    state = rule.renewed(layers(2), CPU, state, ["0"])
    assert rule.asks(state)
    factors, state = rule.factors(of([3.0, 4.0], [3.0, 4.0]), state)
    assert factors.tolist() == pytest.approx([1, 50**0.5], rel=1e-7)
    assert not rule.asks(rule.renewed(layers(1), CPU, state, ["0", "1"]))  # none has come


def test_a_gradient_without_spread_keeps_1() -> None:
    alone = [Layer("", (torch.zeros(1),))]
    rule = InitialSNR()
    assert rule.factors(of([3.0]), rule.init(alone, CPU))[0].tolist() == [1]
    assert followed(InitialSNR(), [of([0.1, 0.1])]) == [[1]]
    assert followed(InitialSNR(), [of([1e38, 1e38])]) == [[1]]


def test_a_loaded_state_takes_the_place_of_another_measurement() -> None:
    def made(gradient: float) -> Any:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adapter = LayerwiseLR(optimizer, InitialSNR(within=1), model)
        for p in model.parameters():
            p.grad = gradient + torch.arange(p.numel(), dtype=p.dtype).view_as(p)
        optimizer.step()
        optimizer.step()
        return adapter, optimizer

    (first, kept), (second, optimizer) = made(1.0), made(5.0)
    assert kept is not optimizer
    expected = first.get_last_factors()
    assert second.get_last_factors() != expected
    second.load_state_dict(first.state_dict())
    optimizer.step()
    assert second.get_last_factors() == expected


# --- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [LDoG(), AdaLip(), NoiseAdaptive()], ids=repr)
def test_copies_stay_with_their_parameters_when_a_layer_comes(rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    optimizer = torch.optim.SGD(model["b"].parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, rule, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = adapter.state_dict()["state"]["copies"]
    optimizer.add_param_group({"params": model["a"].parameters()})
    optimizer.step()
    copies = adapter.state_dict()["state"]["copies"]
    assert sorted(copies) == ["/a.weight", "/b.weight"]
    if isinstance(rule, LDoG):
        assert torch.equal(copies["/b.weight"], before["/b.weight"])
        assert adapter.get_last_factors()["a.weight"] < 1e-4
    assert all(math.isfinite(f) for f in adapter.get_last_factors().values())


@pytest.mark.parametrize("place", [0, 2], ids=["at first", "in the middle"])
@pytest.mark.parametrize(
    "rule", [LDoG(), AdaLip(), NoiseAdaptive(within="all"), LayerMoment(), LayerMoment(bias_correction=True)], ids=repr
)
def test_a_step_that_a_scaler_skips_is_not_learned_from(rule: Any, place: int) -> None:
    """Clipping by value has made numbers of its infinities."""
    trained = []
    for skips in (True, False):
        model, factors = network(torch.float32), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        adapter = LayerwiseLR(optimizer, rule, model)
        for step in range(5):
            if step == place and skips:
                for p in model.parameters():
                    p.grad = torch.full_like(p, 100.0)
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
            backward(model, step)
            optimizer.step()
            factors.append(adapter.get_last_factors())
        trained.append((factors, [p.detach() for p in model.parameters()]))
    (skipped, weights), (plain, expected) = trained
    assert skipped == plain
    assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("rule", [LDoG(), AdaLip(), NoiseAdaptive(), InitialSNR()], ids=repr)
def test_narrow_and_complex_gradients(rule: Any, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((2, 3), 0.5, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    adapter = LayerwiseLR(optimizer, rule, layers={"w": [weight]})
    factors = []
    for step in range(3):
        weight.grad = torch.arange(6).view(2, 3).to(dtype) * 300 * (step + 1)
        optimizer.step()
        factors.append(adapter.get_last_factors()["w"])
    assert all(0 < f < 1e3 for f in factors)
    if isinstance(rule, AdaLip):
        assert factors[1] == pytest.approx(0.84, rel=0.01)


@pytest.mark.parametrize("rule", [LDoG(), AdaLip(), NoiseAdaptive()], ids=repr)
def test_shards_are_refused_with_a_remedy(rule: Any) -> None:
    shard = Shard(torch.Size([4, 2]), 1, (), "cpu", (0, 1))
    with pytest.raises(ValueError, match="the parameters are sharded: use "):
        rule.init([Layer("w", (torch.zeros(2, 2),), shards=(shard,))], CPU)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LDoG(0),
        lambda: LDoG(eps=-1),
        lambda: AdaLip(1),
        lambda: AdaLip(eps=math.inf),
        lambda: NoiseAdaptive(0),
        lambda: NoiseAdaptive(beta=-1),
        lambda: NoiseAdaptive(within="type"),
        lambda: InitialSNR("snr2"),
        lambda: InitialSNR(eps=-1),
        lambda: InitialSNR(within=0),
    ],
)
def test_arguments_out_of_their_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|unknown"):
        make()
