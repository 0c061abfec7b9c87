"""Rates from the tails of the weights' spectra."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer
from layerwise.rules import HeavyTail
from layerwise.rules.heavy_tail import hill_alpha, mapped
from layerwise.sharding import Shard
from layerwise.statistics import Statistics

from .samples import layers_of

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(eigenvalues: list[float]) -> Tensor:
    left, right = (torch.linalg.qr(random(len(eigenvalues), len(eigenvalues), seed=i))[0] for i in (1, 2))
    return left @ torch.tensor(eigenvalues, dtype=torch.float64).sqrt().diag() @ right


def first_factors(rule: HeavyTail, layers: list[Layer]) -> list[float]:
    found: list[float] = rule.factors(Statistics(), rule.init(layers, CPU))[0].tolist()
    return found


@pytest.mark.parametrize(
    ("eigenvalues", "alpha"), [([1, 2, 4, 8], 3.885390081777927), ([math.exp(i) for i in range(6)], 2)]
)
def test_the_exponent_of_a_known_spectrum(eigenvalues: list[float], alpha: float) -> None:
    weight = with_spectrum(eigenvalues)
    for scale in (1.0, 1e-3, 1e6):
        assert float(hill_alpha(scale * weight)) == pytest.approx(alpha, rel=1e-12)
    assert float(hill_alpha(weight.float())) == pytest.approx(alpha, rel=1e-5)


def test_the_exponent_of_kernels_and_of_random_matrices() -> None:
    kernel = random(6, 4, 3, 2)
    expected = reference.hill_alpha(reference.spectrum(kernel.numpy()))
    assert float(hill_alpha(kernel)) == pytest.approx(expected, rel=1e-12)
    square, long = float(hill_alpha(random(64, 64))), float(hill_alpha(random(64, 256)))
    assert (square, long) == (pytest.approx(2.2, abs=0.2), pytest.approx(3.7, abs=0.3))
    for shape in ((64, 256), (256, 64), (100, 64)):
        assert float(hill_alpha(random(*shape), 1.0)) == pytest.approx(square, abs=0.5)
    assert float(hill_alpha(random(64, 256), 4.0)) == pytest.approx(long, rel=1e-12)
    assert float(hill_alpha(random(64, 64), 4.0)) == pytest.approx(long, abs=0.6)


def test_windows_average_their_spectra() -> None:
    weight = random(8, 24)
    each = [np.linalg.svd(weight[:, i : i + 8].numpy(), compute_uv=False) ** 2 for i in (0, 8, 16)]
    assert float(hill_alpha(weight, 1.0)) == pytest.approx(reference.hill_alpha(np.mean(each, 0)), rel=1e-12)


def test_exponents_become_factors() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    assert mapped(torch.tensor([2.0, 3.0, 4.0, math.nan]), none, 0.5, 1.5).tolist() == [0.5, 1, 1.5, 1]
    assert mapped(torch.tensor([2.0, 2.5, 4.0, math.inf]), none, 1.0, 5.0).tolist() == [1, 2, 5, 1]
    topmost = torch.tensor([False, False, True, True])
    assert mapped(torch.tensor([2.0, 3.0, 9.0, math.nan]), topmost, 1.0, 5.0).tolist() == [1, 5, 5, 5]
    assert mapped(torch.tensor([2.0, math.nan, math.nan, math.nan]), none, 0.5, 1.5).tolist() == [1, 1, 1, 1]


def test_temp_balance_leaves_out_the_ends_and_takes_normalisations_along() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3),
        nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 2),
    ).double()  # fmt: skip
    layers = layers_of(model)
    factors = dict(zip([layer.name for layer in layers], first_factors(HeavyTail(least=10), layers), strict=True))
    alphas = {
        name: reference.hill_alpha(reference.spectrum(model[int(name)].weight.detach().numpy())) for name in "249"
    }
    expected = dict(zip("249", reference.heavy_tail(list(alphas.values()), 0.5, 1.5), strict=True))
    shown = {**dict.fromkeys("01678", 1.0), "10": 1.0, **expected, "3": expected["2"]}
    assert factors == pytest.approx(shown, rel=1e-10)
    assert {0.5, 1.5} <= {*factors.values()}


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 12)
        self.h = nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12 * (i + 1))) for i in range(3))
        self.lm_head = nn.Linear(12, 20, bias=False)


def test_llr_gives_embedding_and_head_the_largest_factor() -> None:
    torch.manual_seed(0)
    model = GPT().double()
    layers = layers_of(model)
    factors = dict(zip([layer.name for layer in layers], first_factors(HeavyTail("llr", least=5), layers), strict=True))
    alphas = [reference.hill_alpha(reference.spectrum(block[1].weight.detach().numpy())) for block in model.h]
    expected = reference.heavy_tail(alphas, 1, 5)
    assert [factors[f"h.{i}.1"] for i in range(3)] == pytest.approx(expected, rel=1e-10)
    assert factors["wte"] == factors["lm_head"] == max(expected) == 5
    assert {factors[f"h.{i}.0"] for i in range(3)} == {1.0}


def test_measured_every_few_steps_with_a_ramp_until_the_end() -> None:
    torch.manual_seed(0)
    model = GPT().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = LayerwiseLR(optimizer, HeavyTail("llr", every=4, ramp=2, until=7, least=5), model)
    seen = []
    for step in range(12):
        for p in model.parameters():
            p.grad = random(*p.shape, seed=step)
        optimizer.step()
        seen.append([adapter.get_last_factors()[f"h.{i}.1"] for i in range(3)])
    assert seen[0] == seen[3] != seen[4] != seen[5] != seen[6]
    assert seen[5] == pytest.approx(list(np.array(seen[3]) + (np.array(seen[6]) - seen[3]) * 2 / 3), rel=1e-12)
    assert all(one == seen[6] for one in seen[7:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_keep_1(value: float) -> None:
    weights = [random(8, 8 * (i + 1)) for i in range(5)]
    weights[2][0, 0] = value
    factors = first_factors(HeavyTail(least=2), [Layer(str(i), (w,)) for i, w in enumerate(weights)])
    assert factors == [1, 0.5, 1, 1.5, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    layers = [Layer(str(i), (random(8, 8 * (i + 1)).to(dtype),)) for i in range(4)]
    assert first_factors(HeavyTail(least=2), layers) == [1, 0.5, 1.5, 1]


def test_excluded_layers_are_not_compared() -> None:
    layers = [Layer(str(i), (random(8, 8 * (i + 1)),), included=i != 3) for i in range(6)]
    factors = first_factors(HeavyTail(least=2), layers)
    assert factors.pop(3) == 1
    assert factors == first_factors(HeavyTail(least=2), [layer for layer in layers if layer.included])
    assert {0.5, 1.5} < {*factors}


def test_too_few_matrices_are_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 60))
    caplog.set_level(logging.WARNING, "layerwise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LayerwiseLR(optimizer, HeavyTail(), model)
    assert "measures 1 of 3 layers" in caplog.text
    caplog.clear()
    LayerwiseLR(torch.optim.SGD(model.parameters(), lr=0.1), HeavyTail("llr"), model)
    assert not caplog.records


def test_shards_are_refused() -> None:
    shard = Shard(torch.Size([4, 2]), 1, (), "cpu", (0, 1))
    with pytest.raises(ValueError, match="the parameters are sharded: use a rule of norms"):
        HeavyTail().init([Layer("w", (torch.zeros(2, 2),), shards=(shard,))], CPU)


@pytest.mark.parametrize(
    "arguments",
    [
        {"style": "farms"},
        {"every": 0},
        {"every": 10, "ramp": 10},
        {"until": 0},
        {"least": 0},
        {"limits": (2, 1)},
        {"aspect": 0.5},
    ],
)
def test_arguments_out_of_their_range(arguments: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"must be|unknown"):
        HeavyTail(**arguments)
