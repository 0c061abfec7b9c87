"""Trap 10: Adam divides by the size of its gradients, so multiplying them does nothing; nothing must hide that."""

from __future__ import annotations

import logging

import pytest
import torch

import layerwise
from rule_cases import RULES

KINDS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
KINDS += (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.Adafactor)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
FACTOR = 3.0


class Triple(layerwise.rules.Rule):
    """Asks for the gradient, as the paper's method does."""

    needs = ()
    default_place = "gradient"

    def factors(self, statistics, state):
        return torch.full((3,), FACTOR, dtype=torch.float64), state


def displacement(make_model, backward, kind, **arguments):
    """Return how far the first step goes without weight decay, and the adapter if there is one."""
    model = make_model()
    options = {} if kind is torch.optim.Rprop else {"weight_decay": 0}
    optimizer = kind(model.parameters(), lr=0.001, **options)
    adapter = layerwise.LayerwiseLR(optimizer, Triple(), model, **arguments) if arguments else None
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    backward(model)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before, adapter


@every_kind
def test_the_default_is_no_silent_no_op(kind, make_model, backward, caplog):
    with caplog.at_level(logging.WARNING, logger="layerwise"):
        moved, adapter = displacement(make_model, backward, kind, apply="auto")
    bare, _ = displacement(make_model, backward, kind)
    assert adapter.apply in ("lr", "update")
    torch.testing.assert_close(moved, FACTOR * bare, rtol=1e-9, atol=0)
    assert not caplog.records


@every_kind
def test_the_gradient_place_changes_next_to_nothing_and_says_so(kind, make_model, backward, caplog):
    with caplog.at_level(logging.WARNING, logger="layerwise"):
        moved, adapter = displacement(make_model, backward, kind, apply="gradient")
    bare, _ = displacement(make_model, backward, kind)
    assert adapter.apply == "gradient"
    if kind is not torch.optim.RAdam:  # which is plain descent for its first five steps
        torch.testing.assert_close(moved, bare, rtol=0.01, atol=1e-6)
    (record,) = caplog.records
    assert record.name == "layerwise"
    assert record.levelno == logging.WARNING
    assert kind.__name__ in record.getMessage()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_is_not_invariant_and_nothing_is_said(momentum, make_model, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    with caplog.at_level(logging.WARNING, logger="layerwise"):
        layerwise.LayerwiseLR(optimizer, Triple(), model, apply="gradient")
    assert not caplog.records


@every_kind
def test_the_advice_works_where_it_is_given(kind, make_model, caplog):
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.001)
    with caplog.at_level(logging.WARNING, logger="layerwise"):
        layerwise.LayerwiseLR(optimizer, Triple(), model, apply="gradient").detach()
    advised = next(place for place in ("lr", "update") if f"apply={place!r}" in caplog.text)
    assert layerwise.LayerwiseLR(optimizer, Triple(), model, apply=advised).apply == advised


def made_for(names):
    """Every published method that scales rates, for layers of these names, among which are none of LoRA."""
    made = {name: case.make(names) for name, case in RULES.items() if name != "LoRAPlus"}
    return [rule for rule in made.values() if rule.scales_rates]


@every_kind
def test_a_method_that_scales_rates_is_refused_on_the_gradient_and_the_advice_works(kind, make_model):
    model = make_model()
    names = [name for name, child in model.named_children() if list(child.parameters())]
    optimizer = kind(model.parameters(), lr=0.001)
    rules = made_for(names)
    assert {"LayerDecay", "Unfreezing", "WeightScaled", "FreezeOut"} <= {type(rule).__name__ for rule in rules}
    for rule in [*rules, layerwise.rules.chain(Triple(), rules[0]), layerwise.rules.bounds(rules[0], 0, 2)]:
        arguments = {"model": model, "layers": "module", "exclude": None}
        with pytest.raises(ValueError, match="scales rates, and apply='gradient' would lose its factors") as refused:
            layerwise.LayerwiseLR(optimizer, rule, apply="gradient", **arguments)
        assert not optimizer._optimizer_step_pre_hooks
        advised = next(place for place in ("lr", "update") if f"apply={place!r} scales" in str(refused.value))
        adapter = layerwise.LayerwiseLR(optimizer, rule, apply=advised, **arguments)
        assert adapter.apply == advised
        adapter.detach()


def test_on_descent_such_a_method_may_act_on_the_gradient(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert (
        layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerDecay(0.5), model, apply="gradient").apply == "gradient"
    )
