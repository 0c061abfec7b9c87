"""Rates from the relative gradient norm, measured at the start of each epoch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer
from layerwise.rules import RelativeGradient
from layerwise.sharding import Shard
from layerwise.statistics import Gradients, Statistics

from .samples import gradients_of, layers_of
from .test_finished_step import backward, network

CPU = torch.device("cpu")


def layers(count: int, **options: Any) -> list[Layer]:
    return [Layer(str(i), (torch.zeros(2, 2),), **options) for i in range(count)]


def of(gradient: list[float], weight: list[float], counts: bool = True) -> Statistics:
    norms = {"gradient_norm": torch.tensor(gradient), "weight_norm": torch.tensor(weight)}
    return Statistics(**{k: v.double() for k, v in norms.items()}, counts=torch.tensor(counts))


def test_the_numbers_of_three_layers() -> None:
    rule = RelativeGradient(batches=1)
    factors, _ = rule.factors(of([0.1, 0.4, 0.2], [1, 2, 4]), rule.init(layers(3), CPU))
    assert factors.tolist() == [0.5, 1.0, 0.25]


def test_the_first_steps_of_an_epoch_are_measured_and_the_old_factors_hold_meanwhile() -> None:
    rule = RelativeGradient(batches=2)
    state = rule.init(layers(2), CPU)
    shown, asked = [], []
    for epoch in ([[1, 3], [3, 3], [9, 1]], [[8, 0.5], [8, 1.5], [1, 1]]):
        for gradient in epoch:
            asked.append(rule.asks(state))
            factors, state = rule.factors(of(gradient, [1, 1]), state)
            shown.append(factors.tolist())
        state = rule.end_epoch(state)
    first, second = [2 / 3, 1], [1, 1 / 8]
    assert shown == [[1, 1], first, first, first, second, second]
    assert asked == [True, True, False] * 2


def test_zero_weights_and_excluded_layers_do_not_take_the_maximum() -> None:
    rule = RelativeGradient(batches=1)
    three = [*layers(2), *layers(1, included=False), *layers(1, module=nn.BatchNorm1d(2))]
    factors, _ = rule.factors(of([5.0, 1.0, 9.0, 7.0], [0, 1, 1, 1]), rule.init(three, CPU))
    assert factors.tolist() == [1, 1, 1, 1]
    factors, _ = rule.factors(of([1.0, 5.0], [1, 1]), rule.init(layers(2), CPU))
    assert factors.tolist() == [0.2, 1]


@pytest.mark.parametrize("kind", ["rgn", "snr"])
def test_a_layer_without_a_gradient_has_1(kind: Any) -> None:
    rule = RelativeGradient(kind, batches=2)
    state = rule.init(layers(3), CPU)
    signal = torch.ones(2, 2, dtype=torch.float64)
    for third in (0.0, 1.0):
        gradients = Gradients([signal, 0 * signal, third * signal])
        given = {**vars(of([2.0, 0.0, 4 * third], [1, 1, 1])), "gradients": gradients}
        factors, state = rule.factors(Statistics(**given), state)
    assert factors.tolist() == ([0.5, 1, 1] if kind == "rgn" else [1, 1, 1])


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_steps_that_do_not_count_are_left_out(gradient: float) -> None:
    rule = RelativeGradient(batches=2)
    state = rule.init(layers(2), CPU)
    _, state = rule.factors(of([gradient, 1.0], [1, 1], counts=False), state)
    factors, state = rule.factors(of([1.0, 4.0], [1, 1]), state)
    assert factors.tolist() == [0.25, 1]
    state = rule.end_epoch(state)
    for _ in range(2):
        factors, state = rule.factors(of([gradient, 1.0], [1, 1], counts=False), state)
    assert factors.tolist() == [0.25, 1]  # those of the epoch before


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_signal_to_noise_ratio_decides_which_layers_train(scale: float | None) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 1)).double()
    generator = torch.Generator().manual_seed(0)
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (5.0 if i == 2 else 0.0) + noise
    model[0].weight.grad = torch.tensor([1.0, -1.0] * 12, dtype=torch.float64).view(4, 6).T.contiguous()
    own = layers_of(model, ["0.weight", "1.weight", "0.bias", "2*"])
    expected = reference.signal_to_noise(gradients_of(own)[:3])
    gradients = [p.grad * (scale or 1) for layer in own for p in layer.parameters]
    rule = RelativeGradient("snr", batches=1)
    given = Gradients(gradients, None if scale is None else torch.tensor(scale))
    factors, _ = rule.factors(Statistics(gradients=given, counts=torch.tensor(True)), rule.init(own, CPU))
    assert factors.tolist() == [float(one >= 0.95) for one in expected] + [1.0]  # one row has no variance
    assert expected[0] == pytest.approx(5 / 6, rel=1e-7)  # the smallest of 6 rows
    assert factors[0] == 0


def test_the_ratio_of_a_sparse_gradient_is_that_of_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 3, generator=generator, dtype=torch.float64) + 5
    gradient[2:] = 0  # of the two rows alone the ratio is above the threshold
    rule, own = RelativeGradient("snr", batches=1), [Layer("w", (torch.zeros(6, 3),))]
    shown = []
    for one in (gradient, gradient.to_sparse(1), gradient.to_sparse(2)):
        statistics = Statistics(gradients=Gradients([one]), counts=torch.tensor(True))
        _, state = rule.factors(statistics, rule.init(own, CPU))
        shown.append(state["sum"].tolist())
    assert shown[0] == shown[1] == shown[2] == pytest.approx(list(reference.signal_to_noise([[gradient.numpy()]])))


def test_training_continues_through_epochs() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = LayerwiseLR(optimizer, RelativeGradient(batches=2), model)
    nn.init.zeros_(model[3].weight)
    seen = []
    for step in range(6):
        backward(model, step)
        optimizer.step()
        seen.append(adapter.get_last_factors())
        if step % 3 == 2:
            adapter.end_epoch()
    assert {*seen[0].values()} == {1.0}
    assert seen[1] == seen[2] == seen[3] != seen[4] == seen[5]
    assert seen[1]["3.weight"] == 1
    assert max(f for name, f in seen[5].items() if not name.startswith("3")) <= 1


def test_shards_are_refused_for_the_ratio_of_whole_tensors() -> None:
    shard = Shard(torch.Size([4, 2]), 1, (), "cpu", (0, 1))
    with pytest.raises(ValueError, match="use kind='rgn'"):
        RelativeGradient("snr").init(layers(1, shards=(shard,)), CPU)
    RelativeGradient().init(layers(1, shards=(shard,)), CPU)


def test_arguments_out_of_their_range() -> None:
    with pytest.raises(ValueError, match="allowed: 'rgn', 'snr'"):
        RelativeGradient("rng")
    with pytest.raises(ValueError, match="at least 1"):
        RelativeGradient(batches=0)
    with pytest.raises(TypeError, match="whole number"):
        RelativeGradient(batches=2.5)
