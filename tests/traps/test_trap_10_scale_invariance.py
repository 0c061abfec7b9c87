"""Trap 10: Adam divides by the size of its gradients, so multiplying them does nothing; nothing must hide that."""

from __future__ import annotations

import logging

import pytest
import torch

import layerwise

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
