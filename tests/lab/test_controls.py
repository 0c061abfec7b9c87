"""Controls on a network whose layers share shapes and roles, by hand from the method's record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import polars
import pytest

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import controls, methods
from layerwise.lab.runs.record import Record
from layerwise.lab.tasks import layout
from layerwise.lab.tasks import task as tasks

BLOCKS = """
import torch
from torch import nn

def task(seed, epochs=2, lr=0.05):
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("embed", nn.Linear(4, 6))
    model.add_module("blocks", nn.Sequential(*[nn.Sequential() for _ in range(3)]))
    for block in model.blocks:
        block.add_module("norm", nn.LayerNorm(6))
        block.add_module("mlp", nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 1))
    inputs = torch.randn(32, 4)
    return {
        "model": model,
        "batches": [inputs] * 3,
        "loss": lambda model, batch: (model(batch) - batch[:, :1]).square().mean(),
        "metric": lambda model: {"loss": float(model(inputs).square().mean())},
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "epochs": epochs,
    }
"""
SHAPES = {"embed": (6, 4), "head": (1, 6), **{f"blocks.{i}.mlp": (6, 6) for i in range(3)}}
SHAPES |= {f"blocks.{i}.norm": (6, 1) for i in range(3)}
SIZES = {name: out * into + out for name, (out, into) in SHAPES.items()} | {f"blocks.{i}.norm": 12 for i in range(3)}


@pytest.fixture
def blocks(tmp_path):
    path = tmp_path / "blocks.py"
    path.write_text(BLOCKS, encoding="utf-8")
    return f"{path}:task"


@pytest.fixture
def records(blocks, carried_out):
    """Return the records of the method and of all its controls, and its factors: layer -> one for each update."""
    outcome = carried_out(layout.plan(tasks.load(blocks), arms=["layer-adaptive", *methods.CONTROLS], seeds=1))
    assert outcome.complete
    found = {arm: record for (_, arm, _), record in outcome.results.records.items()}
    return found, factors_of(found["layer-adaptive"])


def factors_of(record: Record) -> dict[str, list[float]]:
    rows = record.metrics().filter(polars.col("quantity") == "factor").sort("step")
    return {str(name): part["value"].to_list() for (name,), part in rows.partition_by("layer", as_dict=True).items()}


def means_of_classes(values, classes):
    return {name: fmean(values[other] for other in values if classes[other] == classes[name]) for name in values}


def test_every_control_repeats_what_it_says(records):
    found, factors = records
    assert {len(values) for values in factors.values()} == {6}
    means = {name: fmean(values) for name, values in factors.items()}
    assert len(set(means.values())) == len(means) == 8

    def constant(arm):
        return found[arm].configuration.rule["factors"]

    weights = math.fsum(SIZES.values())
    weighted = math.fsum(SIZES[name] * mean for name, mean in means.items()) / weights
    assert constant("weighted-mean") == pytest.approx({"*": weighted}, rel=1e-12)
    assert abs(weighted / constant("mean-factor")["*"] - 1) > 1e-3
    assert found["weighted-mean"].configuration.apply == "lr"

    order = list(found["layer-adaptive"].summary["factor"]["names"])
    assert (order[0], order[-1]) == ("embed", "head")
    reverse = dict(zip(order, [means[name] for name in reversed(order)], strict=True))
    assert constant("reversed") == pytest.approx(reverse, rel=1e-12)

    roles = {name: name.rpartition(".")[2] for name in means}  # of their own for the first and the last layer
    assert constant("type-only") == pytest.approx(means_of_classes(means, roles), rel=1e-12)

    assert constant("frozen-at-start") == pytest.approx(
        {name: values[0] for name, values in factors.items()}, rel=1e-12
    )
    assert set(factors_of(found["frozen-at-start"])) == set(factors)

    first = means_of_classes({name: values[0] for name, values in factors.items()}, SHAPES)
    scale = fmean(means.values()) / fmean(first.values())
    by_shape = {name: value * scale for name, value in first.items()}
    assert constant("shape-only") == pytest.approx(by_shape, rel=1e-12)
    assert fmean(constant("shape-only").values()) == pytest.approx(constant("mean-factor")["*"], rel=1e-12)


def test_factors_are_shuffled_among_layers_of_one_shape(records):
    found, factors = records
    sources = found["shuffled-in-shape"].configuration.rule["layers"]
    assert all(SHAPES[name] == SHAPES[source] for name, source in sources.items())
    own = {name for name, source in sources.items() if name == source}
    assert own == {"embed", "head"}  # alone in their shapes
    repeated = factors_of(found["shuffled-in-shape"])
    for name, source in sources.items():
        assert repeated[name] == pytest.approx(factors[source], rel=1e-12)


def test_parameters_that_a_rule_leaves_out_keep_their_rate_in_every_control(blocks, carried_out):
    outcome = carried_out(layout.plan(tasks.load(blocks), arms=["lars", *methods.CONTROLS], seeds=1))
    assert outcome.complete
    records = {arm: record for (_, arm, _), record in outcome.results.records.items()}
    excluded = records["lars"].summary["factor"]["excluded"]
    assert excluded
    for arm in set(methods.CONTROLS) - {"mean-factor", "weighted-mean"}:
        layers = records[arm].summary["factor"]["layers"]
        assert {name: layers[name] for name in excluded} == dict.fromkeys(excluded, 1.0)


def without_equal_shapes(blocks):
    path = Path(blocks.rpartition(":")[0])
    path.write_text(BLOCKS.replace("range(3)", "range(1)"), encoding="utf-8")


@pytest.mark.parametrize("arms", [["layer-adaptive", "shuffled-in-shape"], ["lars", "shuffled-in-shape:lars"]])
def test_a_shuffle_within_shapes_is_refused_where_no_two_layers_share_one(blocks, arms):
    layout.plan(tasks.load(blocks), arms=arms, seeds=1)
    without_equal_shapes(blocks)
    with pytest.raises(UsageError) as caught:
        layout.plan(tasks.load(blocks), arms=arms, seeds=1)
    words = str(caught.value)
    assert f"arm 'shuffled-in-shape' would repeat {arms[0]!r} itself: no two of its" in words
    assert "layers have the same shape; leave the arm out, or take shuffled" in words
    assert layout.plan(tasks.load(blocks), arms=[arms[0], "shuffled"], seeds=1).runs


def test_a_recipe_s_shuffle_within_shapes_is_refused_likewise(blocks, carried_out):
    without_equal_shapes(blocks)
    outcome = carried_out(layout.plan(tasks.load(blocks), arms=["layer-adaptive"], seeds=1))
    record = outcome.results.records["task", "layer-adaptive", 0]
    with pytest.raises(UsageError, match=r"no two layers have the same shape.* leave it out, or use 'shuffled layers'"):
        controls.control_rule("shuffled within shapes", record)
    assert controls.control_rule("shuffled layers", record)["layers"]


@pytest.mark.parametrize("control", ["weighted mean factor", "shuffled within shapes", "mean factor of each role"])
def test_a_run_of_an_earlier_version_is_refused_with_the_remedy(blocks, carried_out, control):
    outcome = carried_out(layout.plan(tasks.load(blocks), arms=["layer-adaptive"], seeds=1))
    record = outcome.results.records["task", "layer-adaptive", 0]
    for name in ("roles", "shapes", "sizes"):
        del record.summary["factor"][name]
    with pytest.raises(UsageError, match=r"does not say the \w+ of its layers.*give another --out"):
        controls.control_rule(control, record)
    assert json.dumps(controls.control_rule("frozen factors", record))


@pytest.mark.full
@pytest.mark.parametrize("name", methods.METHODS)
def test_every_rule_is_an_arm_with_its_controls(blocks, carried_out, name):
    plan = layout.plan(tasks.load(blocks, {"epochs": 3, "lr": 0.005}), arms=[name, "shuffled", "frozen"], seeds=1)
    found = carried_out(plan)
    assert found.complete, found.failures
    records = {arm: record for (_, arm, _), record in found.results.records.items()}
    assert set(records) == {"plain", name, "mean-factor", "shuffled", "frozen"}
    if name == "back-matching":  # products over layers, without a bound
        return
    assert not any(record.diverged for record in records.values())
    layers = records[name].summary["factor"]["layers"]
    assert records["frozen"].summary["factor"]["layers"] == pytest.approx(layers, rel=1e-9)
    sources = records["shuffled"].configuration.rule["layers"]
    swapped = {layer: layers[source] for layer, source in sources.items()}
    assert records["shuffled"].summary["factor"]["layers"] == pytest.approx(swapped, rel=1e-9)


def test_what_a_rule_remarks_is_on_the_page(blocks):
    plan = layout.plan(tasks.load(blocks), arms=["heavy-tail", "agc"], seeds=1)
    for words in ("heavy-tail: HeavyTail(", "so their factors are 1", "agc: AGC leaves the classifier out"):
        assert any(words in note for note in plan.notes)
