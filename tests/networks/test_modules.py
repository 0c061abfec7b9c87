"""Modules of torch whose parameters are not a weight and a bias: their layers, and their steps by the equations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import layerwise
from layerwise.rules import LayerAdaptive

from .by_hand import OPTIMIZERS, ByHand, Layers, expected_factors


class Attending(nn.Module):
    """Attention of torch, queries and keys of other widths included, and a norm."""

    def __init__(self, *, other_widths: bool = False) -> None:
        super().__init__()
        widths = {"kdim": 3, "vdim": 5} if other_widths else {}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **widths)
        self.norm = nn.LayerNorm(4)
        self.widths = (4, 3, 5) if other_widths else (4, 4, 4)

    def forward(self, numbers: Callable[..., Tensor]) -> Tensor:
        query, key, value = (numbers(2, 3, width) for width in self.widths)
        return self.norm(self.attention(query, key, value)[0]) * numbers(2, 3, 4)


class Gated(nn.Module):
    """A list of parameters, a dictionary of them, and one on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.gates = nn.ParameterList([torch.full((3,), 0.1), torch.full((3, 3), 0.2)])
        self.named = nn.ParameterDict({"left": torch.full((3,), 0.3), "right": torch.full((2, 3), 0.4)})

    def forward(self, numbers: Callable[..., Tensor]) -> Tensor:
        hidden = torch.tanh(numbers(4, 3) * self.gates[0] @ self.gates[1]) * self.scale
        return torch.tanh(hidden * self.named["left"]) @ self.named["right"].T


class Normed(nn.Module):
    """Weight normalisation: magnitude, direction and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(3, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, numbers: Callable[..., Tensor]) -> Tensor:
        return self.last(torch.tanh(self.first(numbers(5, 3))))


class Encoded(nn.Module):
    """A layer of torch's own encoder, which holds an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True),
            1,
            enable_nested_tensor=False,
        )

    def forward(self, numbers: Callable[..., Tensor]) -> Tensor:
        return self.encoder(numbers(2, 3, 4)) * numbers(2, 3, 4)


class Stacked(nn.Module):
    """Two depths of GRU in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(3, 4, num_layers=2, batch_first=True)

    def forward(self, numbers: Callable[..., Tensor]) -> Tensor:
        return self.recurrent(numbers(2, 5, 3))[0] * numbers(2, 5, 4)


def pair(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


ATTENTION = ["attention.in_proj_weight", "attention.in_proj_bias"]
OUTPUT = pair("attention.out_proj")
BLOCK = "encoder.layers.0"

CASES: dict[str, tuple[Callable[[], nn.Module], object, Layers]] = {
    "attention": (
        Attending,
        "module",
        {"attention": [*ATTENTION, *OUTPUT], "norm": pair("norm")},
    ),
    "attention as two layers": (
        Attending,
        lambda name, parameter: name.rpartition(".")[0],
        {"attention": ATTENTION, "attention.out_proj": OUTPUT, "norm": pair("norm")},
    ),
    "attention as one layer": (
        Attending,
        ["attention*", "norm"],
        {"attention*": [*ATTENTION, *OUTPUT], "norm": pair("norm")},
    ),
    "attention of other widths": (
        lambda: Attending(other_widths=True),
        "module",
        {
            "attention": [
                *(f"attention.{which}_proj_weight" for which in "qkv"),
                "attention.in_proj_bias",
                *OUTPUT,
            ],
            "norm": pair("norm"),
        },
    ),
    "lists and dictionaries": (
        Gated,
        "module",
        {"": ["scale"], "gates": ["gates.0", "gates.1"], "named": ["named.left", "named.right"]},
    ),
    "weight norm": (
        Normed,
        "module",
        {
            "first": ["first.bias", *(f"first.parametrizations.weight.original{i}" for i in (0, 1))],
            "last": pair("last"),
        },
    ),
    "torch's encoder": (
        Encoded,
        "module",
        {
            f"{BLOCK}.self_attn": [
                *(f"{BLOCK}.self_attn.in_proj_{part}" for part in ("weight", "bias")),
                *pair(f"{BLOCK}.self_attn.out_proj"),
            ],
            **{f"{BLOCK}.{part}": pair(f"{BLOCK}.{part}") for part in ("linear1", "linear2", "norm1", "norm2")},
        },
    ),
    "stacked GRU": (
        Stacked,
        "module",
        {
            "recurrent": [
                f"recurrent.{part}_l{depth}"
                for depth in (0, 1)
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
        },
    ),
    "stacked GRU, one layer a depth": (
        Stacked,
        ["*_l0", "*_l1"],
        {
            f"*_l{depth}": [f"recurrent.{part}_l{depth}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            for depth in (0, 1)
        },
    ),
}


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(50 + step)
    model.zero_grad()
    model(lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_factors_and_weights_are_those_of_the_equations_at_every_step(case, optimizer):
    make, specification, layers = case
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(make().double())
    model, twin = models
    ours = OPTIMIZERS[optimizer](model.parameters())
    adapter = layerwise.LayerwiseLR(ours, LayerAdaptive(), model, layers=specification)
    assert adapter.layers == list(layers)
    hand = ByHand(twin, layers, optimizer)
    for step in range(5):
        backward(model, step)
        backward(twin, step)
        factors = expected_factors(twin, layers)
        ours.step()
        hand.step(factors)
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-8)
        assert min(factors.values()) > 1
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            if name.endswith("in_proj_bias"):
                # The biases of the keys have no gradient but rounding errors, which AdamW divides by themselves.
                (query, key, value), (q, k, v) = a.chunk(3), b.chunk(3)
                torch.testing.assert_close(key, k, rtol=1e-11, atol=1e-8)
                a, b = torch.cat([query, value]), torch.cat([q, v])
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
