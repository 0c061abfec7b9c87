"""Layer-wise decay by depth: ELECTRA's and BEiT's formulas, and depths from names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import layerwise
import reference
from layerwise.layers import Layer
from layerwise.rules import LayerDecay
from layerwise.rules.layer_decay import depths
from layerwise.statistics import Statistics

from .samples import factors_of, layers_of, one_group

Kind = int | Literal["embeddings", "head"]


def vit(blocks: int) -> dict[str, Kind]:
    """The layers of a ViT as timm and BEiT name them; the root owns cls_token and pos_embed."""
    names: dict[str, Kind] = {"": "embeddings", "patch_embed.proj": "embeddings"}
    for b in range(blocks):
        for part in ["", ".norm1", ".attn", ".attn.qkv", ".attn.proj", ".norm2", ".mlp.fc1", ".mlp.fc2"]:
            names[f"blocks.{b}{part}"] = b
    return {**names, "fc_norm": "head", "head": "head"}


def bert(blocks: int) -> dict[str, Kind]:
    names: dict[str, Kind] = {
        f"electra.embeddings.{part}": "embeddings"
        for part in ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"]
    }
    for b in range(blocks):
        for part in [
            "attention.self.query",
            "attention.self.key",
            "attention.output.dense",
            "output.LayerNorm",
        ]:
            names[f"electra.encoder.layer.{b}.{part}"] = b
    return {**names, "classifier.dense": "head", "classifier.out_proj": "head"}


def depth_of(kind: Kind, blocks: int) -> int:
    return {"embeddings": 0, "head": blocks + 1}.get(kind, kind + 1 if isinstance(kind, int) else 0)


def dummies(names: Sequence[str]) -> list[Layer]:
    return [Layer(name, (torch.zeros(1),)) for name in names]


def factors(rule: LayerDecay, names: Sequence[str]) -> list[float]:
    return rule.factors(Statistics(), rule.init(dummies(names), torch.device("cpu")))[0].tolist()


@pytest.mark.parametrize("network", [vit, bert])
@pytest.mark.parametrize("blocks", [1, 2, 11, 12, 24])
def test_transformer_depths_are_embeddings_blocks_head(network: type, blocks: int) -> None:
    names = network(blocks)
    assert depths(list(names)) == [depth_of(kind, blocks) for kind in names.values()]


@pytest.mark.parametrize("network", [vit, bert])
@pytest.mark.parametrize("style", ["beit", "electra"])
@pytest.mark.parametrize(("blocks", "decay"), [(12, 0.8), (24, 0.9), (12, 0.65), (3, 1.0)])
def test_factors_are_those_of_the_reference(
    network: type, style: Literal["beit", "electra"], blocks: int, decay: float
) -> None:
    names = network(blocks)
    expected = reference.layer_decay(list(names.values()), blocks, decay, style)
    np.testing.assert_allclose(factors(LayerDecay(decay, style), list(names)), expected, rtol=1e-12)


def test_electra_base_gives_the_published_rates() -> None:
    names = bert(12)
    by_name = dict(zip(names, factors(LayerDecay(0.8, "electra"), list(names)), strict=True))
    assert by_name["electra.embeddings.word_embeddings"] == pytest.approx(0.8**14)
    assert by_name["electra.encoder.layer.0.attention.self.query"] == pytest.approx(0.8**13)
    assert by_name["electra.encoder.layer.11.output.LayerNorm"] == pytest.approx(0.8**2)
    assert by_name["classifier.dense"] == by_name["classifier.out_proj"] == 1


def test_beit_base_gives_the_published_rates() -> None:
    names = vit(12)
    by_name = dict(zip(names, factors(LayerDecay(0.65), list(names)), strict=True))
    assert by_name[""] == by_name["patch_embed.proj"] == pytest.approx(0.65**13)
    assert by_name["blocks.0.attn.qkv"] == pytest.approx(0.65**12)
    assert by_name["blocks.11"] == by_name["blocks.11.mlp.fc2"] == pytest.approx(0.65)
    assert by_name["fc_norm"] == by_name["head"] == 1


def test_beit_shared_relative_positions_count_with_the_head() -> None:
    names = ["", "patch_embed.proj", "rel_pos_bias", "blocks.0.attn", "blocks.1.attn", "fc_norm", "head"]
    assert depths(names) == [0, 0, 3, 1, 2, 3, 3]


def test_resnet_blocks_are_the_depths() -> None:
    names = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer1.1.conv1", "layer2.0.conv1"]
    names += ["layer2.0.downsample.0", "layer2.0.downsample.1", "layer2.1.conv2", "fc"]
    assert depths(names) == [0, 0, 1, 1, 2, 3, 3, 3, 4, 5]


def test_sequential_counts_each_numbered_layer_from_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    names = [layer.name for layer in layers_of(model)]
    assert names == ["0", "2", "4"]
    assert depths(names) == [0, 1, 2]
    assert factors(LayerDecay(0.5), names) == [0.25, 0.5, 1.0]


def test_vgg_counts_the_classifier_on_after_the_features() -> None:
    assert depths(["features.0", "features.3", "features.8", "classifier.0", "classifier.3"]) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_decoder_counts_from_zero_as_the_encoder_does() -> None:
    names = [
        "shared",
        "encoder.layers.0.fc",
        "encoder.layers.1.fc",
        "encoder.norm",
        "decoder.layers.0.fc",
        "head",
    ]
    assert depths(names) == [0, 1, 2, 3, 1, 3]
    assert factors(LayerDecay(0.5), names) == [0.125, 0.25, 0.5, 1.0, 0.5, 1.0]


def test_names_without_numbers_are_a_depth_each() -> None:
    assert depths(["conv1", "conv2", "ip1", "ip2"]) == [0, 1, 2, 3]


def test_number_inside_a_word_is_no_block() -> None:
    assert depths(["conv1.weight", "h2o.3.fc", "h2o.10.fc", "out1"]) == [0, 1, 2, 3]


def test_a_single_layer_is_the_head() -> None:
    assert factors(LayerDecay(0.5), ["fc"]) == factors(LayerDecay(0.5, "electra"), ["fc"]) == [1.0]


@settings(deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 30), st.sampled_from(["beit", "electra"]))
def test_factors_rise_with_depth_to_one_at_the_head(
    decay: float, blocks: int, style: Literal["beit", "electra"]
) -> None:
    values = factors(LayerDecay(decay, style), list(vit(blocks)))
    assert all(0 < low <= high for low, high in pairwise(values))
    assert values[-1] == 1.0
    assert values[0] == pytest.approx(decay ** (blocks + (1 if style == "beit" else 2)), rel=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.floats(0.1, 1))
def test_depths_of_ones_own_decide_alone(levels: list[int], decay: float) -> None:
    names = [f"part{i}" for i in range(len(levels))]
    rule = LayerDecay(decay, depth=lambda name: levels[names.index(name)])
    np.testing.assert_allclose(factors(rule, names), [decay ** (max(levels) - x) for x in levels], rtol=1e-12)


def test_factors_reach_the_rates_of_an_optimizer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert adapter.apply == "lr"
    assert adapter.get_last_lr() == pytest.approx({"0": 0.025, "1": 0.05, "2": 0.1})


def test_factors_are_the_same_tensor_at_each_step() -> None:
    rule = LayerDecay(0.5)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = rule.init(layers_of(model), torch.device("cpu"))
    first, state = rule.factors(Statistics(), state)
    second, _ = rule.factors(Statistics(), state)
    assert first is second
    assert torch.equal(factors_of(rule, layers_of(model), one_group(model)), first)


@pytest.mark.parametrize("decay", [0, -0.5, 1.0001, math.inf, math.nan, "0.8", None, True], ids=repr)
def test_decay_out_of_range_is_refused(decay: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"decay={re.escape(repr(decay))} must be a number in \(0, 1\]"):
        LayerDecay(decay)


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="style='bert' is unknown; allowed: 'beit', 'electra'"):
        LayerDecay(0.8, "bert")


@pytest.mark.parametrize("level", [-1, 1.5, True, "2", None], ids=repr)
def test_depth_that_is_no_whole_number_is_refused(level: object) -> None:
    rule = LayerDecay(0.8, depth=lambda name: level)
    message = re.escape(f"depth('fc') returned {level!r}; it must be a whole number of at least 0")
    with pytest.raises(ValueError, match=message):
        rule.init(dummies(["fc"]), torch.device("cpu"))
