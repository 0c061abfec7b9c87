"""Depths of networks that people fine-tune, and what LayerDecay makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise.layers import Layer, make_layers
from layerwise.rules import LayerDecay, chain
from layerwise.rules.by_role import ByRole
from layerwise.rules.depths import depths, read_depths

# Parameters of networks of timm 1.0.31 with the depths of its param_groups_layer_decay: depth, prefix, names. A name
# stands for its .weight and .bias, unless it begins with `=`.
VIT = """
    0 - =cls_token =reg_token =pos_embed patch_embed.proj
    1 blocks.0 norm1 attn.qkv attn.proj =ls1.gamma norm2 mlp.fc1 mlp.fc2 =ls2.gamma
    2 blocks.1 norm1 attn.qkv attn.proj =ls1.gamma norm2 mlp.fc1 mlp.fc2 =ls2.gamma
    2 - norm
    3 - head
"""
SWIN = """
    0 patch_embed proj norm
    1 layers.0.blocks.0 norm1 =attn.relative_position_bias_table attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    2 layers.0.blocks.1 norm1 =attn.relative_position_bias_table attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    3 layers.1 downsample.norm =downsample.reduction.weight
    3 layers.1.blocks.0 norm1 =attn.relative_position_bias_table attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    4 layers.2 downsample.norm =downsample.reduction.weight
    4 layers.2.blocks.0 norm1 =attn.relative_position_bias_table attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    5 layers.2.blocks.1 norm1 =attn.relative_position_bias_table attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    6 layers.3 downsample.norm =downsample.reduction.weight
    6 layers.3.blocks.0 norm1 =attn.relative_position_bias_table attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    6 - norm
    7 - head.fc
"""
CONVNEXT = """
    0 stem 0 1
    1 stages.0.blocks.0 =gamma conv_dw norm mlp.fc1 mlp.fc2
    2 stages.0.blocks.1 =gamma conv_dw norm mlp.fc1 mlp.fc2
    3 stages.1 downsample.0 downsample.1
    3 stages.1.blocks.0 =gamma conv_dw norm mlp.fc1 mlp.fc2
    4 stages.2 downsample.0 downsample.1
    4 stages.2.blocks.0 =gamma conv_dw norm mlp.fc1 mlp.fc2
    5 stages.2.blocks.1 =gamma conv_dw norm mlp.fc1 mlp.fc2
    6 stages.3 downsample.0 downsample.1
    6 stages.3.blocks.0 =gamma conv_dw norm mlp.fc1 mlp.fc2
    7 head norm fc
"""
MATCHERS: dict[str, dict[str, Any]] = {
    VIT: {
        "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
        "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
    },
    SWIN: {
        "stem": r"^patch_embed",
        "blocks": [
            (r"^layers\.(\d+).downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ],
    },
    CONVNEXT: {
        "stem": r"^stem",
        "blocks": [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_pre", (99999,)),
        ],
    },
}
TIMM = pytest.mark.parametrize("text", [VIT, SWIN, CONVNEXT], ids=["ViT", "Swin", "ConvNeXt"])


def recorded(text: str) -> dict[str, int]:
    """Return the depth of each parameter that a text lists."""
    found: dict[str, int] = {}
    for line in text.split("\n"):
        depth, prefix, *names = line.split() or ["0", "-"]
        for name in names:
            leaves = [""] if name[0] == "=" else [".weight", ".bias"]
            found |= {f"{prefix}.{name.lstrip('=')}{leaf}".removeprefix("-."): int(depth) for leaf in leaves}
    return found


def made(names: Sequence[str], layers: Any = "module", frozen: str = "$") -> list[Layer]:
    """Return layers of parameters of these names; those that match `frozen` require no gradient."""
    named = {name: nn.Parameter(torch.zeros(2), not re.match(frozen, name)) for name in names}
    return make_layers(named, layers)


def by_name(layers: Sequence[Layer], values: Sequence[Any]) -> dict[str, Any]:
    return {name: value for layer, value in zip(layers, values, strict=True) for name in layer.parameter_names}


def factors(rule: Any, layers: Sequence[Layer]) -> list[float]:
    return rule.init(layers, torch.device("cpu"))["_factors"].tolist()


# --- timm ------------------------------------------------------------------------------------------------------------


@TIMM
@pytest.mark.parametrize("layers", ["module", "parameter"])
def test_depths_of_timms_networks_are_those_of_its_groups(text: str, layers: str) -> None:
    expected = recorded(text)
    own = made(list(expected), layers)
    read = read_depths(own)
    assert not read.doubts
    assert set(read.top) == {max(expected.values())}
    # BEiT, MAE and DINOv2 count a norm after the last block with the head; timm counts it with that block.
    beit = {name: depth + (name.startswith("norm.")) for name, depth in expected.items()}
    assert by_name(own, read.depth) == beit


@TIMM
def test_factors_by_a_group_matcher_are_timms(text: str) -> None:
    expected = recorded(text)
    own = made(list(expected))
    rule = LayerDecay(0.6, depth=MATCHERS[text], min_scale=0.1)
    scales = reference.layer_decay_by_depth(list(expected.values()), 0.6, least=0.1)
    np.testing.assert_allclose(list(by_name(own, factors(rule, own)).values()), scales, rtol=1e-15)
    assert rule.doubts(own) == []


def test_tokens_are_inputs_wherever_they_are_registered() -> None:
    names = ["blocks.0.fc.weight", "blocks.1.fc.weight", "norm.weight", "reg_token", "tokens.mask_token", "head.weight"]
    assert read_depths(made(names)).depth == [1, 2, 3, 0, 0, 3]
    assert read_depths(made(names, "parameter")).depth == [1, 2, 3, 0, 0, 3]
    assert depths(["blocks.0.fc", "blocks.1.fc", "reg_token", "head"]) == [1, 2, 0, 3]


@pytest.mark.parametrize("copy", ["emablocks", "ema.blocks", "teacher.blocks"])
def test_a_frozen_copy_shifts_no_depth(copy: str) -> None:
    student = "student.blocks" if copy == "teacher.blocks" else "blocks"
    own = [f"{student}.0.fc", f"{student}.1.fc"]
    copied = [f"{copy}.0.fc", f"{copy}.1.fc"]
    names = ["embed.weight", *(f"{name}.weight" for name in [*own, *copied]), "head.weight"]
    read = read_depths(made(names, frozen=copy))
    assert read.depth == [0, 1, 2, 1, 2, 3]
    assert read.doubts == []
    assert read_depths(made(names)).doubts  # a copy that is trained is none


def test_a_frozen_lower_half_counts() -> None:
    names = ["embed.weight", *(f"blocks.{i}.fc.weight" for i in range(4)), "head.weight"]
    assert read_depths(made(names, frozen=r"blocks\.[01]|embed")).depth == [0, 1, 2, 3, 4, 5]
    names = ["features.0.weight", "features.2.weight", "classifier.0.weight", "classifier.2.weight"]
    assert read_depths(made(names, frozen="features")).depth == [0, 1, 2, 3]


# --- transformers ----------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


def hugging_face(kind: str, configuration: str, **sizes: Any) -> list[Layer]:
    transformers: Any = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, configuration)(**sizes))
    return made([name for name, _ in model.named_parameters()])


def test_bert_has_electras_rates() -> None:
    layers = hugging_face("BertForSequenceClassification", "BertConfig", **SMALL, num_hidden_layers=3, vocab_size=9)
    found = dict(zip([layer.name for layer in layers], factors(LayerDecay(0.8, "electra"), layers), strict=True))
    for name, factor in found.items():
        block = re.search(r"layer\.(\d+)\.", name)
        # _get_layer_lrs of ELECTRA's code: d^(N + 2 − depth), the head N + 2; the pooler lies above the blocks.
        depth = 0 if "embeddings" in name else int(block[1]) + 1 if block else 5
        assert factor == pytest.approx(0.8 ** (5 - depth), rel=1e-15), name


def test_clips_towers_stand_beside_each_other() -> None:
    text, vision = {**SMALL, "num_hidden_layers": 2}, {**SMALL, "num_hidden_layers": 4}
    layers = hugging_face("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=4)
    read = read_depths(layers)
    assert read.doubts == []
    found = dict(zip([layer.name for layer in layers], zip(read.depth, read.top, strict=True), strict=True))
    rates = dict(zip(found, factors(LayerDecay(0.5), layers), strict=True))
    for tower, blocks in (("text_model", 2), ("vision_model", 4)):
        for name, (depth, top) in found.items():
            if name.startswith(tower):
                block = re.search(r"layers\.(\d+)\.", name)
                below = "embedding" in name or "pre_layrnorm" in name
                assert depth == (int(block[1]) + 1 if block else 0 if below else blocks + 1), name
                assert top == blocks + 1
                assert rates[name] == 0.5 ** (top - depth)
    for name in ("", "visual_projection", "text_projection"):  # the root owns logit_scale
        assert found[name] == (5, 5)


def test_barts_encoder_and_decoder_stand_beside_each_other() -> None:
    layers = hugging_face(
        "BartForConditionalGeneration",
        "BartConfig",
        d_model=8,
        encoder_layers=3,
        decoder_layers=2,
        vocab_size=9,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    read = read_depths(layers)
    assert read.doubts == []
    for layer, depth, top in zip(layers, read.depth, read.top, strict=True):
        block = re.search(r"layers\.(\d+)\.", layer.name)
        assert depth == (int(block[1]) + 1 if block else 0), layer.name  # the head is tied to the embedding
        assert top == (2 if "decoder" in layer.name else 3)


def test_a_tower_at_the_root() -> None:
    names = [
        *("positional_embedding", "visual.class_embedding", "visual.conv1.weight", "visual.ln_pre.weight"),
        *(f"visual.transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(3)),
        *(
            "visual.ln_post.weight",
            "transformer.resblocks.0.mlp.c_fc.weight",
            "transformer.resblocks.1.mlp.c_fc.weight",
        ),
        *("token_embedding.weight", "ln_final.weight"),
    ]
    read = read_depths(made(names))
    assert read.doubts == []
    assert read.depth == [0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 0, 3]
    assert [read.top[0], read.top[4], read.top[8]] == [3, 4, 3]


@pytest.mark.parametrize("inside", ["", "blocks."])
def test_an_autoencoder_is_one_column_in_doubt(inside: str) -> None:
    names = [f"encoder.{inside}{i}.conv.weight" for i in range(2)] + [
        f"decoder.{inside}{i}.up.weight" for i in range(2)
    ]
    read = read_depths(made(names))
    assert read.depth == [0, 1, 2, 3]
    assert "several numbered stacks" in read.doubts[0]


def test_towers_share_a_head_that_is_a_chain() -> None:
    names = [f"{tower}.layers.{i}.fc" for tower in ("encoder", "decoder") for i in range(2)]
    assert depths([*names, "classifier.0", "classifier.2"]) == [0, 1, 0, 1, 2, 2]


def test_parts_of_a_block_are_no_blocks() -> None:
    layers = hugging_face(
        "T5ForConditionalGeneration", "T5Config", num_layers=2, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=9
    )
    read = read_depths(layers)
    assert read.doubts == []
    for layer, depth in zip(layers, read.depth, strict=True):
        block = re.search(r"block\.(\d+)\.", layer.name)
        assert depth == (int(block[1]) + 1 if block else 0 if layer.name == "shared" else 3), layer.name


def test_staged_networks_count_blocks_in_their_order() -> None:
    layers = hugging_face(
        "SwinForImageClassification",
        "SwinConfig",
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        image_size=32,
        window_size=2,
    )
    found = {layer.name: depth for layer, depth in zip(layers, read_depths(layers).depth, strict=True)}
    # Hugging Face's Swin downsamples at the end of a stage, so this belongs to the block before it.
    assert found["swin.encoder.layers.0.downsample.reduction"] == 2
    assert found["swin.encoder.layers.1.blocks.1.mlp.fc1"] == 4
    assert found["classifier"] == found["swin.layernorm"] == 5
    assert depths(["blocks.0.0.a", "blocks.0.0.b", "blocks.1.0.a", "blocks.1.0.b", "blocks.1.1.a", "blocks.1.1.b"]) == [
        *(0, 0, 1, 1, 2, 2)
    ]


def test_heads_in_a_list_are_on_top_together() -> None:
    names = ["embed", "blocks.0.fc", "blocks.1.fc", "heads.0", "heads.1.0", "heads.1.2"]
    assert depths(names) == [0, 1, 2, 3, 3, 3]
    assert read_depths(made([f"{name}.weight" for name in names])).doubts == []
    assert depths(["conv1", "conv2", "heads.0", "heads.1"]) == [0, 1, 2, 2]


# --- Arguments -------------------------------------------------------------------------------------------------------


def test_four_groups_of_ulmfit() -> None:
    layers = made(["embedding.weight", "rnns.0.w.weight", "rnns.1.w.weight", "head.weight"])
    expected = [0.0568957669, 0.1479289941, 0.3846153846, 1.0]
    np.testing.assert_allclose(factors(LayerDecay(1 / 2.6), layers), expected, atol=1e-10, rtol=0)
    lower = [expected[i + 1] / expected[i] for i in range(3)]
    np.testing.assert_allclose(lower, 2.6, rtol=1e-8)


def test_min_scale_freeze_below_and_multiply_come_in_this_order() -> None:
    layers = made(
        ["patch_embed.proj.weight", *(f"blocks.{i}.mlp.fc1.weight" for i in range(3)), "norm.weight", "head.weight"]
    )
    rule = LayerDecay(
        0.5, min_scale=0.2, freeze_below=1, multiply={"stem": 0.5, "head": 10.0, "*.1.mlp.*": 2.0, "*": 3.0}
    )
    expected = [0.0, 0.2 * 3, 0.25 * 6, 0.5 * 3, 1.0 * 3, 1.0 * 30]
    np.testing.assert_allclose(factors(rule, layers), expected, rtol=1e-15)
    by_depth = reference.layer_decay_by_depth([0, 1, 2, 3, 4, 4], 0.5, 0.2, 1, [0.5 * 3, 3, 6, 3, 3, 30])
    np.testing.assert_allclose(factors(rule, layers), by_depth, rtol=1e-15)
    assert [row.split()[:2] for row in rule.table(layers)[1:]] == [
        *(["0", "0"], ["1", "0.6"], ["2", "1.5"], ["3", "1.5"], ["4", "3"], ["4", "30"])
    ]


def test_multiply_is_a_chain_with_by_role() -> None:
    layers = made(list(recorded(VIT)), "parameter")
    one = factors(LayerDecay(0.9, multiply={"stem": 0.2}), layers)
    state = chain(LayerDecay(0.9), ByRole("dinov2")).init(layers, torch.device("cpu"))
    np.testing.assert_allclose(one, (state["0"]["_factors"] * state["1"]["_factors"]).tolist(), rtol=1e-15)


def test_layers_below_a_depth_stand_still() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    layerwise.LayerwiseLR(optimizer, LayerDecay(0.5, freeze_below=1), model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    groups = layerwise.param_groups(model, LayerDecay(0.5, freeze_below=1), lr=0.1, weight_decay=0.1)
    assert sorted({group["lr"] for group in groups}) == [0.0, 0.05, 0.1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"min_scale": 2}, ValueError, "from 0 to 1, such as 0.01"),
        ({"min_scale": "0"}, ValueError, "from 0 to 1"),
        ({"freeze_below": -1}, ValueError, "whole number of at least 0"),
        ({"freeze_below": 1.0}, ValueError, "whole number of at least 0"),
        ({"multiply": 3}, TypeError, "a mapping of roles or patterns"),
        ({"multiply": {"head": -1}}, ValueError, "multiply 'head': factor -1 must be a finite number"),
        ({"depth": 3}, TypeError, "a function from a layer's name to its depth"),
    ],
)
def test_arguments_out_of_their_range(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LayerDecay(0.5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"freeze_below": 9}, "freezes every layer: depths go from 0 to 2"),
        ({"multiply": {"hed": 2}}, "multiply pattern 'hed' matches none"),
        ({"multiply": {"stem": 2}}, "'stem' is the role of no layer; there are ffn, head"),
        ({"depth": {"blocks": 3}}, "no mapping of words to patterns"),
    ],
)
def test_what_fits_no_layer_is_refused(arguments: dict[str, Any], words: str) -> None:
    layers = made(["blocks.0.fc1.weight", "blocks.1.fc1.weight", "head.weight"])
    with pytest.raises(ValueError, match=words):
        LayerDecay(0.5, **arguments).init(layers, torch.device("cpu"))


def test_the_repr_shows_new_arguments_only_where_they_are_given() -> None:
    assert repr(LayerDecay(0.5)) == "LayerDecay(decay=0.5, style='beit', depth=None)"
    assert repr(LayerDecay(0.5, min_scale=0.1)) == "LayerDecay(decay=0.5, style='beit', depth=None, min_scale=0.1)"
