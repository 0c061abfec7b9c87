"""The transformer for text: its equations, its tied weight, and a training on real text."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import layerwise
import reference
from layerwise.lab.data import text
from layerwise.lab.errors import UsageError
from layerwise.lab.models.transformer import TransformerLanguageModel
from layerwise.lab.training import networks
from layerwise.rules import ByRole, LayerAdaptive, LayerDecay

from .by_hand import CASES, loss_of_text


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 112_384),
        ({"width": 32}, 31_616),
        ({"vocabulary": 11, "context": 6, "width": 8, "depth": 3, "heads": 2}, 2_768),
    ],
    ids=["default", "narrow", "tiny"],
)
def test_the_parameter_count_is_that_of_the_layout_and_the_tied_weight_counts_once(sizes, count):
    model = TransformerLanguageModel(0, **sizes)
    assert sum(p.numel() for p in model.parameters()) == count
    s = {"vocabulary": 128, "context": 64, "width": 64, "depth": 2, **sizes}
    w = s["width"]
    assert count == s["vocabulary"] * w + s["context"] * w + s["depth"] * (12 * w * w + 13 * w) + 2 * w
    assert len(list(model.parameters())) == 4 + 12 * s["depth"]


def slow_block(x: np.ndarray, block: nn.Module, heads: int, *, causal: bool) -> np.ndarray:
    """Compute a block place by place and head by head."""
    w = {name: p.detach().numpy() for name, p in block.named_parameters()}

    def linear(name: str, row: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ row + w[f"{name}.bias"]

    def norm(name: str, row: np.ndarray) -> np.ndarray:
        return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(row: np.ndarray) -> np.ndarray:
        return np.array([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in row])

    width = x.shape[1]
    size = width // heads
    projected = [linear("attention.query_key_value", norm("norm1", row)) for row in x]
    after = []
    for t, row in enumerate(x):
        mixed = np.zeros(width)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            seen = range(t + 1) if causal else range(len(x))
            scores = np.array(
                [projected[t][:width][part] @ projected[s][width : 2 * width][part] / math.sqrt(size) for s in seen]
            )
            shares = np.exp(scores) / np.exp(scores).sum()
            mixed[part] = sum(a * projected[s][2 * width :][part] for a, s in zip(shares, seen, strict=True))
        after.append(row + linear("attention.output", mixed))
    return np.array([row + linear("contract", gelu(linear("expand", norm("norm2", row)))) for row in after])


def test_the_scores_are_those_of_the_equations_place_by_place():
    model = CASES["transformer"].build()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms at 0 and 1 would hide mistakes
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    symbols = torch.tensor([3, 1, 4, 1, 5, 9])
    table = model.embedding.weight.detach().numpy()
    x = table[symbols.numpy()] + model.position.weight.detach().numpy()
    for block in model.blocks:
        x = slow_block(x, block, heads=2, causal=True)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = x * model.norm.weight.detach().numpy() + model.norm.bias.detach().numpy()
    np.testing.assert_allclose(model(symbols[None])[0].detach().numpy(), x @ table.T, rtol=1e-10, atol=1e-12)


def test_no_score_depends_on_what_follows():
    model = CASES["transformer"].build()
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 7, 8]])
    torch.testing.assert_close(model(one)[:, :2], model(other)[:, :2], rtol=0, atol=1e-15)
    assert (model(one)[:, 2:] != model(other)[:, 2:]).all()


def with_separate_weights(model: TransformerLanguageModel, sizes: dict[str, int]) -> TransformerLanguageModel:
    """Build the network with matrices of its own for queries, keys and values, at the fused weights."""
    apart = TransformerLanguageModel(0, **sizes, separate=True, tied=False).double()
    found = model.state_dict()
    for block in range(sizes["depth"]):
        begin = f"blocks.{block}.attention"
        parts = found.pop(f"{begin}.query_key_value.weight").chunk(3)
        found |= {f"{begin}.{name}.weight": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
        del found[f"{begin}.query_key_value.bias"], found[f"{begin}.output.bias"]
    apart.load_state_dict(found)
    return apart


def test_separate_matrices_compute_what_fused_ones_without_biases_do():
    sizes = {"vocabulary": 11, "context": 6, "width": 8, "depth": 3, "heads": 2}
    model = TransformerLanguageModel(0, **sizes).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
            if "attention" in name and name.endswith("bias"):
                p.zero_()
    apart = with_separate_weights(model, sizes)
    one, other = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[3, 1, 4, 1, 2, 6]])
    torch.testing.assert_close(apart(one), model(one), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(apart(one)[:, :4], apart(other)[:, :4], rtol=0, atol=1e-15)  # the causal mask
    assert (apart(one)[:, 4:] != apart(other)[:, 4:]).any()
    assert apart.head.weight is not apart.embedding.weight


@pytest.mark.parametrize(("name", "width", "count"), [("gpt4", None, 840_448), ("gpt6", 192, 2_738_688)])
def test_the_gpts_of_recipes_have_the_size_and_the_roles_that_blockwise_rates_ask_for(name, width, count):
    model = networks.build(name, 0, classes=128, channels=1, width=width)
    assert sum(p.numel() for p in model.parameters()) == count
    optimizer = torch.optim.AdamW(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, ByRole("blockwise"), model)
    assert set(adapter.roles.values()) == {"embedding", "position", "qk", "vo", "ffn", "norm", "head"}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    factors = adapter.get_last_factors()
    mean = math.fsum(p.numel() * factors[own] for own, p in model.named_parameters()) / count
    if name == "gpt4":
        assert mean == pytest.approx(6.220225403594274, rel=1e-14)


def test_the_tied_weight_is_one_layer_whose_gradient_holds_both_uses():
    model, apart = CASES["transformer"].build(), CASES["transformer"].build()
    apart.head.weight = nn.Parameter(apart.embedding.weight.detach().clone())
    loss_of_text(model, 0).backward()
    loss_of_text(apart, 0).backward()
    both = apart.embedding.weight.grad + apart.head.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, both, rtol=1e-12, atol=1e-15)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert "head" not in adapter.layers
    assert adapter.layers.count("embedding") == 1
    optimizer.step()
    expected = reference.layer_adaptive([[both.numpy()]])[0]
    assert adapter.get_last_factors()["embedding"] == pytest.approx(expected, rel=1e-12)
    separate = layerwise.LayerwiseLR(torch.optim.AdamW(apart.parameters()), LayerAdaptive(), apart)
    assert separate.layers == [*adapter.layers, "head"]


def test_the_tied_weight_stays_tied_through_training():
    model = CASES["transformer"].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of_text(model, step).backward()
        optimizer.step()
    assert model.head.weight is model.embedding.weight


def test_patterns_make_one_layer_a_block():
    model = CASES["transformer"].build()
    groups = layerwise.param_groups(model, ["embedding", "position", "blocks.0.*", "blocks.1.*", "norm"])
    assert [(group["name"], len(group["params"])) for group in groups] == [
        ("embedding", 1), ("position", 1), ("blocks.0.*", 12), ("blocks.1.*", 12), ("norm", 2),
    ]  # fmt: skip


def test_layer_decay_counts_the_tied_weight_with_the_embeddings():
    model = CASES["transformer"].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model)
    loss_of_text(model, 0).backward()
    optimizer.step()
    kinds = ["embeddings", "embeddings", *[0] * 6, *[1] * 6, "head"]
    expected = reference.layer_decay(kinds, 2, 0.5, "beit")
    assert list(adapter.get_last_factors().values()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["vocabulary", "context", "width", "depth", "heads"])
@pytest.mark.parametrize("value", [0, 1.5, True], ids=repr)
def test_a_size_that_is_no_whole_number_from_one_is_named(name, value):
    with pytest.raises(UsageError, match=f"{name}={value!r}: use a whole number from 1"):
        TransformerLanguageModel(0, **{name: value})


def test_heads_that_do_not_divide_the_width_and_inputs_that_are_too_long_are_refused():
    with pytest.raises(UsageError, match="heads=3 with width=64: use a number of heads that divides the width"):
        TransformerLanguageModel(0, heads=3)
    with pytest.raises(UsageError, match="length=7: use at most the context, 6"):
        CASES["transformer"].build()(torch.zeros(1, 7, dtype=torch.long))


# --- Text -------------------------------------------------------------------------------------------------------------


def test_the_text_is_english_in_numbers_and_nothing_of_it_is_in_both_parts():
    known = text.load()
    assert known.train.dtype == known.test.dtype == torch.long
    assert len(known.train) > 300_000
    assert 0 <= len(known.train) - 9 * len(known.test) < 10
    assert int(known.train.max()) < 128
    words = bytes(known.train.tolist()).decode("ascii")
    assert words.startswith('The "assert" statement')
    assert words.count(" the ") > 1000
    again = text.of(words + bytes(known.test.tolist()).decode("ascii"))
    assert torch.equal(again.train, known.train)
    assert torch.equal(again.test, known.test)


def test_a_python_without_the_text_is_told_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.delitem(sys.modules, "pydoc_data.topics", raising=False)
    with pytest.raises(UsageError, match="this Python has no module 'pydoc_data', which holds the text: use one with"):
        text.load.__wrapped__()


def test_characters_that_are_not_ascii_are_left_out():
    assert bytes(text.of("é1234567890").train.tolist()) == b"123456789"


def test_windows_are_pieces_of_the_text_at_places_that_the_generator_draws():
    symbols = torch.arange(100)
    cut = text.windows(symbols, 500, 7, torch.Generator().manual_seed(3))
    assert cut.shape == (500, 7)
    assert ((cut[:, 1:] - cut[:, :-1]) == 1).all()
    assert {int(first) for first in cut[:, 0]} == set(range(94))
    assert torch.equal(cut, text.windows(symbols, 500, 7, torch.Generator().manual_seed(3)))


def test_the_entropy_is_the_least_loss_of_fixed_scores():
    symbols = torch.tensor([0, 0, 0, 1, 1, 3])
    shares = torch.tensor([3 / 6, 2 / 6, 1e-300, 1 / 6], dtype=torch.float64)
    least = functional.cross_entropy(shares.log().expand(6, 4), symbols).item()
    assert text.entropy(symbols) == pytest.approx(least, rel=1e-12)
    for _ in range(50):
        scores = torch.randn(4, dtype=torch.float64).expand(6, 4)
        assert functional.cross_entropy(scores, symbols).item() > least


def test_on_real_text_the_loss_falls_far_below_what_any_model_without_context_reaches():
    known = text.load()
    tests = text.windows(known.test, 64, 65, torch.Generator().manual_seed(1))
    model = TransformerLanguageModel(0, width=32)

    def loss_on(windows):
        return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    bound = text.entropy(known.test)
    assert loss_on(tests).item() > bound + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        optimizer.zero_grad()
        loss_on(text.windows(known.train, 8, 65, generator)).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_on(tests).item() < bound - 0.5
