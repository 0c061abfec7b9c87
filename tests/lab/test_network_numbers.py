"""What `doctor` says of a network beside its updates: sharpness by role, spectra, activations by width."""

from __future__ import annotations

import json
import math
from statistics import median

import pytest
import torch
from torch import nn

import layerwise
from layerwise.lab import cli
from layerwise.lab.errors import UsageError
from layerwise.lab.tasks import doctor, network_numbers
from layerwise.lab.tasks import task as tasks
from layerwise.sinks import Memory

SCALED = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(1, width, bias=False, dtype=torch.float64)
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.head = nn.Linear(width, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(self.embed.weight)
        nn.init.ones_(self.head.weight)

    def forward(self, inputs):
        return self.head(self.embed(inputs) + 0 * self.norm(self.embed(inputs)))

def task(seed, width=2, lr=0.0):
    model = Wide(width)
    inputs = torch.full((4, 1), 3.0, dtype=torch.float64)
    return {
        "model": model,
        "batches": [inputs] * 5,
        "loss": lambda model, batch: model(batch).mean() + model.norm.weight.square().sum(),
        "metric": lambda model: {"loss": float(model(inputs).mean())},
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "epochs": 1,
    }
"""


@pytest.fixture
def scaled(tmp_path):
    path = tmp_path / "scaled.py"
    path.write_text(SCALED, encoding="utf-8")
    return f"{path}:task"


def test_sharpness_is_the_mean_square_of_a_roles_gradient_by_that_of_the_network():
    """S_r = B ‖g_r‖² / n_r of Wang et al. 2025, by that of all weights; from the gradients themselves."""
    modules = {"norm": nn.LayerNorm(6), "fc1": nn.Linear(6, 6), "fc2": nn.Linear(6, 6), "head": nn.Linear(6, 2)}
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module.double())
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.1), Memory()
    monitor = layerwise.Monitor(optimizer, model, every=1, sinks=[memory])
    by_hand = []
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
        square = {name: sum(float(p.grad.square().sum()) for p in own.parameters()) for name, own in modules.items()}
        mean = math.fsum(square.values()) / (12 + 42 + 42 + 14)
        by_hand.append(
            (square["norm"] / 12 / mean, (square["fc1"] + square["fc2"]) / 84 / mean, square["head"] / 14 / mean)
        )
        optimizer.step()
    monitor.detach()
    found = network_numbers.sharpness(memory.records, network_numbers.layers_of(model, memory.records[0].layers))
    assert [(one.role, one.layers) for one in found] == [("norm", 1), ("ffn", 2), ("head", 1)]
    assert [one.sharpness for one in found] == pytest.approx([median(values) for values in zip(*by_hand, strict=True)])


def test_the_exponent_of_a_spectrum_is_that_of_the_rule():
    layer = network_numbers.Layer("l", (torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64).sqrt().diag(),))
    (found,) = network_numbers.spectra([layer, network_numbers.Layer("bias", (torch.ones(3),))])
    assert (found.layer, found.count) == ("l", 4)
    assert found.alpha == pytest.approx(3.885390081777927, rel=1e-12)


def test_activations_are_those_after_the_updates_and_their_exponent_that_of_the_width(scaled):
    """At a rate of 0 the embedding's outputs are 3 at each width, and the head's sum 3 · width of them."""
    found = doctor.examine(tasks.load(scaled), steps=2, widths={"width": [8, 2, 4]}).activations
    assert (found.parameter, list(found.values), found.updates) == ("width", [2, 4, 8], 3)
    assert list(found.means["embed"]) == pytest.approx([3.0, 3.0, 3.0])
    assert list(found.means["head"]) == pytest.approx([6.0, 12.0, 24.0])
    assert found.exponent("embed") == pytest.approx(0.0, abs=1e-12)
    assert found.exponent("head") == pytest.approx(1.0, rel=1e-12)


def test_activations_come_after_three_updates(scaled):
    """The weights of the embedding and the head move by lr · 3 each an update where both begin at 1."""
    embed = head = 1.0
    for _ in range(3):
        embed, head = embed - 0.01 * 3 * head, head - 0.01 * 3 * embed
    widths = {"width": [1, 2]}
    found = doctor.activations_of(tasks.load(scaled, {"lr": 0.01}), "width", widths["width"])
    assert list(found.means["embed"]) == pytest.approx([3 * embed] * 2, rel=1e-12)
    assert list(found.means["head"]) == pytest.approx([3 * embed * head, 6 * embed * head], rel=1e-12)


@pytest.mark.parametrize(
    "widths", [{"width": [4]}, {"width": [4, "x"]}, {"width": [0, 4]}, {"width": [2, 4], "lr": [1, 2]}]
)
def test_widths_that_make_no_curve_are_refused_with_the_remedy(scaled, widths):
    with pytest.raises(UsageError, match="as width=16,32,64"):
        doctor.examine(tasks.load(scaled), widths=widths)


def test_a_parameter_that_the_task_does_not_take_is_refused(scaled):
    with pytest.raises(UsageError, match="breadth=2 is no parameter of the function"):
        doctor.examine(tasks.load(scaled), widths={"breadth": [2, 4]})


def test_the_command_prints_them_and_the_page_has_them(scaled, tmp_path, capsys):
    words = ["doctor", scaled, "--steps", "3", "--out", str(tmp_path / "runs")]
    asked = [*words, "--spectrum", "--coordinate-check", "width=2,4"]
    cli.main(asked)
    printed = capsys.readouterr().out
    for line in (
        "sharpness   of the weights of each role",
        "spectrum    Hill exponent",
        "activations mean |output| after 3",
    ):
        assert line in printed
    assert any(line.split() == ["head", "6", "12", "1.00"] for line in printed.splitlines())
    page = next((tmp_path / "runs" / "doctor").glob("*.html")).read_text(encoding="utf-8")
    assert "activations mean |output| after 3" in page
    cli.main([*asked, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["activations"]["means"]["head"] == pytest.approx([6.0, 12.0])
    assert {one["role"] for one in found["training"]["roles"]} >= {"norm"}
    assert found["training"]["spectra"]
    cli.main(words)
    printed = capsys.readouterr().out
    assert "sharpness " in printed
    assert "spectrum " not in printed
    assert "activations " not in printed
