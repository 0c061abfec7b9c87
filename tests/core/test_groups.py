"""Permanent parameter groups, one a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise import LayerwiseLR, param_groups, rules


def test_each_layer_has_a_named_group_in_the_models_order(make_model):
    model = make_model()
    groups = param_groups(model)
    assert [group["name"] for group in groups] == ["0", "2", "4"]
    assert [group["param_names"] for group in groups][1] == ["2.weight", "2.bias"]
    assert groups[1]["params"][0] is model[2].weight


def test_an_optimizer_takes_the_groups_and_keeps_a_rate_for_each(make_model, backward):
    model = make_model()
    groups = param_groups(model)
    groups[0]["lr"] = 0.0
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("0", 0.0),
        ("2", 0.1),
        ("4", 0.1),
    ]
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)] == [True] * 2 + [False] * 4


def test_an_adapter_finds_its_layers_by_the_names_in_the_groups(make_model):
    optimizer = torch.optim.SGD(param_groups(make_model()), lr=0.1)
    assert LayerwiseLR(optimizer, rules.LayerAdaptive()).layers == ["0", "2", "4"]


def test_layers_are_chosen_as_in_an_adapter(make_model):
    model = make_model()
    assert [group["name"] for group in param_groups(model, ["*.bias", "*"])] == ["*", "*.bias"]
    assert len(param_groups(model, "parameter")) == 6
    halves = param_groups(model, lambda name, p: "head" if name.startswith("4") else "body")
    assert [(group["name"], len(group["params"])) for group in halves] == [("body", 4), ("head", 2)]


def test_frozen_parameters_are_left_out_and_tied_ones_appear_once():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    model["body"].requires_grad_(False)
    groups = param_groups(model)
    assert {group["name"]: group["param_names"] for group in groups} == {
        "embed": ["embed.weight"],
        "head": ["head.bias"],
    }


@pytest.mark.parametrize(
    ("model", "layers", "error", "message"),
    [
        ("network", "module", TypeError, "must be a torch.nn.Module or None, .* not str"),
        (
            nn.Linear(2, 1).requires_grad_(False),
            "module",
            ValueError,
            "no parameter that requires a gradient",
        ),
        (
            nn.Linear(2, 1),
            ["bias"],
            ValueError,
            r"\['bias'\] leaves out \['weight'\]; add a pattern such as '\*'",
        ),
        (nn.Linear(2, 1), "blocks", ValueError, "layers='blocks' is unknown; allowed: 'module'"),
        (nn.Linear(2, 1), ["head"], ValueError, "pattern 'head' matches none of 'weight'"),
    ],
    ids=["no model", "nothing to train", "a parameter left out", "an unknown word", "an unknown pattern"],
)
def test_wrong_input_is_told_of(model, layers, error, message):
    with pytest.raises(error, match=message):
        param_groups(model, layers)
