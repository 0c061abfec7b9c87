"""Wrong arguments: the message names the value and the remedy, and nothing stays half attached."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import Constant, LayerAdaptive, Rule


class NeedsTheUnknown(Rule):
    needs = ("gradient_norm", "curvature")

    def factors(self, statistics, state):
        return statistics.gradient_norm, state


class NeedsOneString(NeedsTheUnknown):
    needs = "gradient_norm"


class LooksLikeARule:
    needs = ("gradient_norm",)

    def factors(self, statistics, state):
        return statistics.gradient_norm, state


class FailsToStart(Rule):
    def init(self, layers, device):
        raise ValueError("the file of this rule is missing")

    def factors(self, statistics, state):
        return statistics.gradient_norm, state


STRANGER = nn.Linear(5, 2)
# argument, its value, the error, and what the message must say
CASES = {
    "no optimizer": ("optimizer", "sgd", TypeError, ["'sgd'", "str", "no torch.optim.Optimizer"]),
    "a missing optimizer": ("optimizer", None, TypeError, ["None", "pass the optimizer"]),
    "a rule class": (
        "rule",
        LayerAdaptive,
        TypeError,
        ["LayerAdaptive is a class", "call it: LayerAdaptive("],
    ),
    "no rule": ("rule", "LARS", TypeError, ["'LARS'", "str", "factors(statistics, state)"]),
    "a function as rule": ("rule", math.sqrt, TypeError, ["sqrt", "not a layerwise.rules.Rule"]),
    "a rule's look-alike": (
        "rule",
        LooksLikeARule(),
        TypeError,
        ["LooksLikeARule", "not a layerwise.rules.Rule", "derives from layerwise.rules.Rule"],
    ),
    "an unknown statistic": (
        "rule",
        NeedsTheUnknown(),
        ValueError,
        ["'curvature'", "'gradient_norm'", "'counts'"],
    ),
    "one string as statistics": (
        "rule",
        NeedsOneString(),
        TypeError,
        ["'gradient_norm' is one string", "write"],
    ),
    "a rule that fails to start": ("rule", FailsToStart(), ValueError, ["file of this rule is missing"]),
    "a rule's unknown layer": (
        "rule",
        Constant({"22": 2.0}),
        ValueError,
        ["'22'", "'0', '2', '4'", "mean '2'?"],
    ),
    "no model": ("model", "net", TypeError, ["str", "torch.nn.Module or None"]),
    "neither model nor names": (
        "model",
        None,
        ValueError,
        ["no names", "pass model=", "named_parameters()"],
    ),
    "a stranger's model": (
        "model",
        STRANGER,
        ValueError,
        ["Linear owns none of the 6 parameters", "built from"],
    ),
    "an unknown word for layers": (
        "layers",
        "block",
        ValueError,
        ["'block'", "'module'", "'parameter'", "list"],
    ),
    "a number for layers": ("layers", 3, TypeError, ["layers=3", "int", "'module'"]),
    "no layers at all": ("layers", [], ValueError, ["layers=[]", "'module'"]),
    "an unknown layer": ("layers", ["0.wieght"], ValueError, ["'0.wieght'", "mean '0.weight'?"]),
    "a layer pattern that is a number": ("layers", [2], TypeError, ["layers holds 2", "int", "string"]),
    "a callable that returns a number": (
        "layers",
        lambda n, p: 1,
        TypeError,
        ["returned 1", "string or None"],
    ),
    "a callable that leaves all out": (
        "layers",
        lambda n, p: None,
        ValueError,
        ["no parameter", "'0.weight'"],
    ),
    "an unknown place": (
        "apply",
        "weights",
        ValueError,
        ["'weights'", "'gradient'", "'lr'", "'update'", "'auto'"],
    ),
    "no place": ("apply", None, TypeError, ["apply=None", "'gradient'", "'lr'", "'update'"]),
    "an unknown decay": ("decay", "coupled", ValueError, ["'coupled'", "'scaled'", "'plain'", "'auto'"]),
    "a number for decay": ("decay", 0.1, TypeError, ["decay=0.1", "float", "'scaled'", "'plain'"]),
    "an unknown exclusion": ("exclude", ["fc"], ValueError, ["exclude", "'fc'", "'0', '2', '4'"]),
    "one string to exclude": ("exclude", "4", TypeError, ["exclude='4'", "list of patterns"]),
    "a number to exclude": ("exclude", 4, TypeError, ["exclude=4", "callable"]),
    "a pattern to exclude that is a number": ("exclude", [4], TypeError, ["exclude holds 4", "string"]),
    "reversed bounds": ("bounds", (2, 1), ValueError, ["(2, 1)", "low <= high"]),
    "negative bounds": ("bounds", (-1, 1), ValueError, ["(-1, 1)", "0 <= low"]),
    "bounds with a NaN": ("bounds", (math.nan, 1.0), ValueError, ["nan", "low <= high"]),
    "bounds with a NaN above": ("bounds", (0.0, math.nan), ValueError, ["nan", "low <= high"]),
    "bounds of infinity": ("bounds", (math.inf, math.inf), ValueError, ["inf", "low <= high"]),
    "one bound": ("bounds", (1,), TypeError, ["(1,)", "two numbers"]),
    "three bounds": ("bounds", (1, 2, 3), TypeError, ["(1, 2, 3)", "two numbers"]),
    "a number for bounds": ("bounds", 5, TypeError, ["bounds=5", "two numbers"]),
    "a string for bounds": ("bounds", "01", TypeError, ["'01'", "two numbers"]),
    "bounds of strings": ("bounds", ("0", "1"), TypeError, ["('0', '1')", "two numbers"]),
    "bounds of truth values": ("bounds", (False, True), TypeError, ["True", "two numbers"]),
    "LBFGS": ("optimizer", torch.optim.LBFGS, ValueError, ["LBFGS", "first-order optimizer"]),
    "the rate of Rprop": (
        "optimizer",
        torch.optim.Rprop,
        ValueError,
        ["apply='lr'", "Rprop", "apply='update'"],
    ),
    "the rate of ASGD": ("optimizer", torch.optim.ASGD, ValueError, ["apply='lr'", "ASGD", "apply='update'"]),
}


def forms_of_hooks(optimizer):
    return {name: dict(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}


def make_optimizer(kind, model):
    if kind is torch.optim.SGD:
        return kind(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    return kind(model.parameters(), lr=0.02)


@pytest.mark.parametrize("with_one_attached", [False, True], ids=["bare", "beside another adapter"])
@pytest.mark.parametrize(("argument", "value", "error", "words"), CASES.values(), ids=CASES)
def test_wrong_input_is_told_of_and_nothing_stays_attached(
    argument, value, error, words, with_one_attached, make_model, backward, train, weights, assert_same_bits
):
    model, twin = make_model(), make_model()
    kind = value if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) else torch.optim.SGD
    optimizer, bare = make_optimizer(kind, model), make_optimizer(kind, twin)
    if with_one_attached and kind is not torch.optim.LBFGS:
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        layerwise.LayerwiseLR(bare, LayerAdaptive(), twin)
    before, hooks = dict(vars(optimizer)), forms_of_hooks(optimizer)

    arguments = {"optimizer": optimizer, "rule": LayerAdaptive(), "model": model}
    if kind is not torch.optim.SGD:
        arguments["apply"] = "lr"
    else:
        arguments[argument] = value
    with pytest.raises(error) as caught:
        layerwise.LayerwiseLR(**arguments)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)

    assert vars(optimizer).keys() == before.keys()
    assert all(vars(optimizer)[name] is kept for name, kept in before.items())
    assert forms_of_hooks(optimizer) == hooks
    if not with_one_attached:
        assert not any(hooks.values())
    for network, stepped in ((model, optimizer), (twin, bare)):
        if kind is torch.optim.LBFGS:
            stepped.step(lambda network=network: torch.enable_grad()(backward)(network))
        else:
            train(network, stepped)
    assert_same_bits(weights(model), weights(twin))


def test_the_decay_of_an_unknown_optimizer_must_be_told(make_model):
    class Unknown(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"weight_decay": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            group = self.param_groups[0]
            for p in group["params"]:
                p.sub_(0.1 * (p.grad + group["weight_decay"] * p))

    model = make_model()
    optimizer = Unknown(model.parameters())
    with pytest.raises(ValueError, match=r"weight decay of Unknown.*decay='scaled'.*decay='plain'"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="gradient")
    with pytest.raises(ValueError, match=r"Unknown: it has no 'lr' in its parameter groups; use apply='update'"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")
    assert not any(forms_of_hooks(optimizer).values())
    automatic = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert automatic.apply == "update"
    automatic.detach()
    assert layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="gradient", decay="plain").layers


def test_an_object_that_holds_no_optimizer_is_refused():
    class Wrapper:
        optimizer = "none"

    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer"):
        layerwise.LayerwiseLR(Wrapper(), LayerAdaptive(), STRANGER)


def test_the_argument_after_the_model_must_be_named(make_model):
    model = make_model()
    with pytest.raises(TypeError, match="positional"):
        layerwise.LayerwiseLR(torch.optim.SGD(model.parameters()), LayerAdaptive(), model, "module")
