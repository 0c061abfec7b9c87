"""Sharded training takes the steps that one process takes."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.statistics import OF_STEP
from rule_cases import RULES

from .cases import CASES, train_alone
from .processes import run
from .training import train

RUNS = [
    ("DDP", 2),
    ("ZeroRedundancyOptimizer", 2),
    ("ZeroRedundancyOptimizer", 3),
    ("FSDP2", 2),
    ("FSDP2", 3),
    ("FSDP2", 4),
    ("FSDP2, offloaded", 2),
    ("HSDP", 4),
    ("tensor parallel", 2),
    ("FSDP2 and tensor parallel", 4),
    ("FSDP2 and tensor parallel, one layer apart", 4),
    ("FSDP1", 2),
    ("FSDP1", 3),
    ("FSDP1, NO_SHARD", 2),
]
NAMES = list(CASES)
OF_FSDP2 = {name for name, case in RULES.items() if case.sharded == "FSDP2"}
PARTS = []  # each way has a rule or two in every run of the tests, and each rule a way
for number, (way, world) in enumerate(RUNS):
    few, told = NAMES[number :: len(RUNS)], f"{way}, {world} processes"
    # Where each process steps only some parameters, the changes of the others are not known: see test_refusals.
    unknown = [name for name in NAMES if way.startswith("Zero") and not OF_STEP.isdisjoint(CASES[name].rule().needs)]
    rest = [name for name in NAMES if name not in few and (name not in OF_FSDP2 or (way, world) == ("FSDP2", 2))]
    few, rest = ([name for name in part if name not in unknown] for part in (few, rest))
    PARTS.append(pytest.param(way, world, few, id=told))
    PARTS.append(pytest.param(way, world, rest, id=f"{told}, the other rules", marks=pytest.mark.full))


@pytest.mark.dist
@pytest.mark.parametrize(("way", "world", "names"), PARTS)
def test_a_trajectory_is_that_of_one_process_to_rounding(way, world, names):
    results = run(world, train, way, names)
    for name in names:
        weights, factors, selection = train_alone(CASES[name])
        for rank, result in enumerate(results):
            told = f"{name}, process {rank}"
            found = result[name]
            assert list(found["weights"]) == list(weights)
            for key, weight in weights.items():
                torch.testing.assert_close(found["weights"][key], weight, rtol=1e-10, atol=1e-12, msg=f"{told}: {key}")
            for step, (ours, one) in enumerate(zip(found["factors"], factors, strict=True)):
                assert ours == pytest.approx(one, rel=1e-10), f"{told}, step {step}"
                assert ours == results[0][name]["factors"][step], f"{told}: processes disagree at step {step}"
            assert_same_selection(found["selection"], selection, told)
        if selection is not None:
            assert 0 < sum(chosen for _, _, chosen in selection) < len(selection), f"{name} tests nothing"


def assert_same_selection(found, expected, told):
    assert (found is None) == (expected is None), told
    for ours, one in zip(found or [], expected or [], strict=True):
        assert ours[2] == one[2], told
        for value, wanted in zip(ours[:2], one[:2], strict=True):
            assert value == pytest.approx(wanted, rel=1e-9) or (math.isnan(value) and math.isnan(wanted)), told
