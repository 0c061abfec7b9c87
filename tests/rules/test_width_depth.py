"""Rates that follow from width and depth, beside the code of muP and PyTorch's Muon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer, make_layers
from layerwise.rules import WidthDepth

CPU = torch.device("cpu")


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, width, 3), nn.Conv1d(width, 2 * width, 3), nn.LayerNorm(6), nn.Flatten(),
        nn.Linear(12 * width, width), nn.Tanh(), nn.Linear(width, 4),
    ).double()  # fmt: skip


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def factors_of(rule: WidthDepth, model: nn.Module, specification: Any = "parameter") -> dict[str, float]:
    layers = make_layers(dict(model.named_parameters()), specification, model)
    values: list[float] = rule.init(layers, CPU)["_factors"].tolist()
    return dict(zip([layer.name for layer in layers], values, strict=True))


def test_adam_at_four_times_the_width() -> None:
    layer = Layer("h.0.fc1.weight", (torch.zeros(512, 512),))
    assert WidthDepth(128, width=512).init([layer], CPU)["_factors"].tolist() == [0.25]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_factors_from_base_shapes(kind: Any) -> None:
    model, base = network(32), shapes(network(8))
    expected = {name: reference.mup(p.shape, base[name], kind) for name, p in model.named_parameters()}
    assert factors_of(WidthDepth(base, kind), model) == expected
    assert {*expected.values()} == ({0.25, 1.0} if kind == "adam" else {1.0, 4.0})
    assert {*factors_of(WidthDepth(shapes(model), kind), model).values()} == {1.0}


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_training_is_that_of_mup(kind: Any) -> None:
    shaped: Any = pytest.importorskip("mup.infshape")
    from mup.optim import MuAdam, MuSGD

    model, alike, base = network(32), network(32), shapes(network(8))
    for name, p in alike.named_parameters():
        dims = [shaped.InfDim(None if o == n else o, n) for o, n in zip(base[name], p.shape, strict=True)]
        p.infshape = shaped.InfShape(dims)
    make: Any = torch.optim.Adam if kind == "adam" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=0.01)
    LayerwiseLR(optimizer, WidthDepth(base, kind), model)
    theirs = (MuAdam if kind == "adam" else MuSGD)(alike.parameters(), lr=0.01)
    groups = make(layerwise.param_groups(third := network(32), WidthDepth(base, kind), lr=0.01))
    for step in range(5):
        for net, each in ((model, optimizer), (alike, theirs), (third, groups)):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            each.step()
    assert all(map(torch.equal, model.parameters(), alike.parameters()))
    assert all(map(torch.equal, model.parameters(), third.parameters()))


@pytest.mark.parametrize("kind", ["rms_to_rms", "muon", "match_rms_adamw"])
def test_factors_of_shapes(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Conv2d(4, 6, 3), nn.Linear(30, 2), nn.Embedding(50, 4))
    factors = factors_of(WidthDepth(kind=kind), model)
    for name, p in model.named_parameters():
        expected = 1.0 if name.startswith("3") else reference.of_shape(p.shape, kind)
        assert factors[name] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("kind", ["muon", "match_rms_adamw"])
def test_on_orthogonalised_updates_it_is_the_adjustment_of_pytorch(kind: Any) -> None:
    models = [nn.Sequential(nn.Linear(4, 9, bias=False), nn.Linear(9, 2, bias=False)) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    changes = []
    for model, adjust in zip(models, ("original", "original" if kind == "muon" else "match_rms_adamw"), strict=True):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust)
        for p in model.parameters():
            p.grad = torch.ones_like(p) + torch.eye(*p.shape)
        optimizer.step()
        changes.append([float((p.detach() - old).norm()) for p, old in zip(model.parameters(), before, strict=True)])
    bare = [c / reference.of_shape(p.shape, "muon") for c, p in zip(changes[0], models[0].parameters(), strict=True)]
    factors = factors_of(WidthDepth(kind=kind), models[1])
    assert [c / b for c, b in zip(changes[1], bare, strict=True)] == pytest.approx(list(factors.values()), rel=1e-3)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln, self.fc1 = nn.LayerNorm(width), nn.Linear(width, width)


class GPT(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, width)
        self.h = nn.ModuleList(Block(width) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 11)


def test_a_base_width_reads_the_roles() -> None:
    model = GPT(32)
    adam = factors_of(WidthDepth(8), model)
    assert adam == factors_of(WidthDepth(shapes(GPT(8))), model)
    assert [name for name, factor in adam.items() if factor == 0.25] == ["h.0.fc1.weight", "h.1.fc1.weight"]
    assert factors_of(WidthDepth(8, "sgd"), model) == factors_of(WidthDepth(shapes(GPT(8)), "sgd"), model)
    assert WidthDepth(8).table(make_layers(dict(model.named_parameters()), "parameter", model))[1].startswith("0.25 ")


def test_depth_is_that_of_complete_p() -> None:
    factors = factors_of(WidthDepth(8, depth=4, alpha=0.5), GPT(32))
    assert factors["h.1.fc1.weight"] == 0.25 * 4**-0.5
    assert factors["h.1.fc1.bias"] == factors["h.0.ln.weight"] == 0.5
    assert factors["wte.weight"] == factors["ln_f.weight"] == factors["lm_head.weight"] == 1
    assert factors_of(WidthDepth(8, depth=4), GPT(32)) == factors_of(WidthDepth(8), GPT(32))


def test_weights_with_the_inputs_first() -> None:
    conv = nn.ConvTranspose1d(16, 4, 3)
    assert factors_of(WidthDepth({"weight": (4, 2, 3), "bias": (2,)}), conv)["weight"] == 0.25
    assert factors_of(WidthDepth({"weight": (4, 2, 3), "bias": (2,)}, "sgd"), conv)["weight"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs the base network"),
        ({"base": 0}, "at least 1"),
        ({"base": True}, "at least 1"),
        ({"base": 8, "kind": "lion"}, "allowed: 'adam'"),
        ({"base": 8, "kind": "muon"}, "leave base out"),
        ({"base": {}, "width": 8}, "beside a base width"),
        ({"base": 8, "depth": 0}, "above 0"),
        ({"base": 8, "alpha": 2}, "from 0.5 to 1"),
        ({"base": 8, "kind": "sgd", "depth": 2}, "leave it out"),
    ],
)
def test_arguments_out_of_their_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WidthDepth(**arguments)


def test_a_base_that_does_not_fit() -> None:
    model = network(16)
    with pytest.raises(ValueError, match=r"pass width="):
        factors_of(WidthDepth(8), model)
    with pytest.raises(ValueError, match=r"no shape for '0\.weight'"):
        factors_of(WidthDepth({}), model)
    with pytest.raises(ValueError, match="not in dimensions or kernels"):
        factors_of(WidthDepth({**shapes(model), "0.weight": (8, 3, 5)}), model)
    with pytest.raises(TypeError, match="must be a width, or a mapping"):
        WidthDepth("small")


def test_the_shape_of_a_transposed_convolution_with_groups() -> None:
    conv = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)  # each output sees 3 inputs at 9 positions
    assert factors_of(WidthDepth(kind="match_rms_adamw"), conv)["weight"] == pytest.approx(0.2 * 27**0.5, rel=1e-15)
