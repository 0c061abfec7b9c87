"""The LSTM: its equations, one layer or one a depth, and a training on real digits row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.models.recurrent import RecurrentClassifier
from layerwise.rules import LayerAdaptive, LayerDecay

from .by_hand import CASES, OPTIMIZERS, ByHand, expected_factors, loss_of_sequences

BY_DEPTH = {
    **{
        f"recurrent.{depth}": [
            f"recurrent.{part}_l{depth}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        for depth in (0, 1)
    },
    "head": ["head.weight", "head.bias"],
}


@pytest.mark.parametrize(
    ("sizes", "count"),
    [({}, 57_994), ({"width": 32}, 16_714), ({"classes": 4, "inputs": 3, "width": 5, "depth": 2}, 464)],
    ids=["default", "narrow", "tiny"],
)
def test_the_parameter_count_is_that_of_the_gates(sizes, count):
    assert sum(p.numel() for p in RecurrentClassifier(0, **sizes).parameters()) == count


def test_the_scores_are_those_of_the_gates_step_by_step():
    model = CASES["LSTM"].build()
    sequence = torch.randn(6, 3, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    rows = list(sequence.numpy())
    for depth in (0, 1):
        hidden, cell, after = np.zeros(5), np.zeros(5), []
        for row in rows:
            z = w[f"recurrent.weight_ih_l{depth}"] @ row + w[f"recurrent.bias_ih_l{depth}"]
            z = z + w[f"recurrent.weight_hh_l{depth}"] @ hidden + w[f"recurrent.bias_hh_l{depth}"]
            enter, forget, new, leave = z[:5], z[5:10], z[10:15], z[15:]
            cell = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(new)
            hidden = sigmoid(leave) * np.tanh(cell)
            after.append(hidden)
        rows = after
    expected = w["head.weight"] @ rows[-1] + w["head.bias"]
    np.testing.assert_allclose(model(sequence[None])[0].detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_one_layer_a_depth_is_found_by_the_function_of_the_page_and_by_patterns(shown):
    model = CASES["LSTM"].build()
    by_function = layerwise.param_groups(model, shown("one_a_depth"))
    assert {group["name"]: group["param_names"] for group in by_function} == BY_DEPTH
    by_patterns = layerwise.param_groups(model, ["recurrent.*_l0", "recurrent.*_l1", "head"])
    assert [group["param_names"] for group in by_patterns] == list(BY_DEPTH.values())


def test_the_function_of_the_page_takes_both_directions_projections_and_other_modules(shown):
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
            "gru": nn.GRU(3, 4),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 2),
        }
    )
    groups = layerwise.param_groups(model, shown("one_a_depth"))
    assert {group["name"]: len(group["params"]) for group in groups} == {
        "lstm.0": 10, "lstm.1": 10, "gru.0": 4, "norm": 2, "head": 2,
    }  # fmt: skip
    root = layerwise.param_groups(nn.LSTM(3, 4, num_layers=2), shown("one_a_depth"))
    assert [group["name"] for group in root] == ["0", "1"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_factors_and_weights_of_one_layer_a_depth_are_those_of_the_equations(shown, optimizer, assert_close):
    model, twin = CASES["LSTM"].build(), CASES["LSTM"].build()
    ours = OPTIMIZERS[optimizer](model.parameters())
    adapter = layerwise.LayerwiseLR(ours, LayerAdaptive(), model, layers=shown("one_a_depth"))
    hand = ByHand(twin, BY_DEPTH, optimizer)
    for step in range(5):
        for network in (model, twin):
            network.zero_grad()
            loss_of_sequences(network, step).backward()
        factors = expected_factors(twin, BY_DEPTH)
        ours.step()
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        hand.step(factors)
        assert_close(list(model.parameters()), list(twin.parameters()))


def test_layer_decay_counts_the_depths(shown):
    model = CASES["LSTM"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model, layers=shown("one_a_depth"))
    loss_of_sequences(model, 0).backward()
    optimizer.step()
    assert adapter.get_last_lr() == pytest.approx({"recurrent.0": 0.025, "recurrent.1": 0.05, "head": 0.1})


@pytest.mark.parametrize("name", ["classes", "inputs", "width", "depth"])
def test_a_size_below_one_is_named(name):
    with pytest.raises(UsageError, match=f"{name}=0: use a whole number from 1"):
        RecurrentClassifier(0, **{name: 0})


@pytest.mark.full
def test_on_real_digits_it_beats_a_linear_classifier(digits, linear_accuracy, shown):
    model = RecurrentClassifier(0)
    optimizer = torch.optim.AdamW(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers=shown("one_a_depth"))
    accuracy = digits.train(model, optimizer, epochs=5, shape=lambda images: images[:, 0], peak=3e-3)
    assert accuracy > linear_accuracy + 0.01
