"""The vision transformer: its equations, layer-wise decay over its depths, and a training on real digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import layerwise
import reference
from layerwise.lab.errors import UsageError
from layerwise.lab.models.vit import VisionTransformer
from layerwise.rules import LayerAdaptive, LayerDecay
from layerwise.rules.layer_decay import depths

from .by_hand import CASES, ByHand, expected_factors, loss_of_images, named
from .test_transformer import slow_block


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 105_098),
        ({"width": 32}, 27_978),
        ({"classes": 4, "side": 6, "patch": 3, "channels": 2, "width": 8, "depth": 2, "heads": 2}, 1_996),
    ],
    ids=["default", "narrow", "tiny"],
)
def test_the_parameter_count_is_that_of_the_layout(sizes, count):
    assert sum(p.numel() for p in VisionTransformer(0, **sizes).parameters()) == count


def test_the_scores_are_those_of_the_equations_patch_by_patch():
    model = CASES["vision transformer"].build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    image = torch.randn(2, 6, 6, dtype=torch.float64).numpy()
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    rows = [w["class_token"][0, 0]]
    for top in (0, 3):
        for left in (0, 3):
            patch = image[:, top : top + 3, left : left + 3]
            rows.append(np.array([(w["patches.weight"][k] * patch).sum() for k in range(8)]) + w["patches.bias"])
    x = np.array(rows) + w["position"][0]
    for block in model.blocks:
        x = slow_block(x, block, heads=2, causal=False)
    token = (x[0] - x[0].mean()) / np.sqrt(x[0].var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
    expected = w["head.weight"] @ token + w["head.bias"]
    np.testing.assert_allclose(model(torch.from_numpy(image)[None])[0].detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 11, 12])
def test_token_positions_and_patches_have_depth_0_block_i_depth_i_and_1_norm_and_head_the_last(depth):
    model = VisionTransformer(0, width=4, heads=1, depth=depth)
    names = layerwise.LayerwiseLR(torch.optim.SGD(model.parameters()), LayerDecay(0.5), model).layers
    assert names[:2] == ["", "patches"]
    assert names[-2:] == ["norm", "head"]
    blocks = [int(name.split(".")[1]) + 1 for name in names[2:-2]]
    assert depths(names) == [0, 0, *blocks, depth + 1, depth + 1]
    assert blocks == [number for number in range(1, depth + 1) for _ in range(6)]


KINDS = ["embeddings", "embeddings", *[0] * 6, *[1] * 6, "head", "head"]
"""Of the layers of the small network, in their order."""


@pytest.mark.parametrize("style", ["beit", "electra"])
def test_decayed_rates_and_weights_are_those_of_the_equations_at_every_step(style, assert_close):
    case = CASES["vision transformer"]
    model, twin = case.build(), case.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.75, style), model)
    hand = ByHand(twin, case.layers, "AdamW")
    factors = dict(zip(case.layers, reference.layer_decay(KINDS, 2, 0.75, style).tolist(), strict=True))
    for step in range(5):
        for network in (model, twin):
            network.zero_grad()
            loss_of_images(network, step).backward()
        optimizer.step()
        hand.step(factors)
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-12)
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            if not name.endswith("query_key_value.bias"):  # those of the keys have no gradient but rounding errors
                assert_close(a, b)


def test_with_a_frozen_body_only_norm_and_head_are_trained(assert_same_bits):
    case = CASES["vision transformer"]
    model = case.build()
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for step in range(4):
        optimizer.zero_grad()
        loss_of_images(model, step).backward()
        trained = {name: case.layers[name] for name in ("norm", "head")}
        factors = {**dict.fromkeys(case.layers, 1.0), **expected_factors(model, trained)}
        optimizer.step()
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
    assert_same_bits({name: named(model)[name] for name in before}, before)


@pytest.mark.parametrize("name", ["classes", "side", "patch", "channels", "width", "depth", "heads"])
def test_a_size_below_one_is_named(name):
    with pytest.raises(UsageError, match=f"{name}=0: use a whole number from 1"):
        VisionTransformer(0, **{name: 0})


def test_patches_that_do_not_fill_the_image_are_refused():
    with pytest.raises(UsageError, match="patch=8 with side=28: use a side of a patch that divides the image's"):
        VisionTransformer(0, patch=8)


@pytest.mark.full
def test_on_real_digits_it_beats_a_linear_classifier(digits, linear_accuracy):
    model = VisionTransformer(0, width=32)
    optimizer = torch.optim.AdamW(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerDecay(0.8), model)
    accuracy = digits.train(model, optimizer, epochs=7, shape=lambda images: images, peak=5e-3)
    assert accuracy > linear_accuracy + 0.01
