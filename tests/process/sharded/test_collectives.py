"""However many layers there are, a step takes one collective more than the optimizer's own, for each mesh."""

from __future__ import annotations

import pytest

from .processes import run
from .training import count

ONE = {
    "LayerAdaptive, momentum": [1] * 6,
    "LARS, momentum": [1] * 6,
    "chain, bounded": [1] * 6,
    "moments": [1] * 6,
    "amplification by G": [1, 1, 1, 0, 0, 0],  # an epoch of analysis, and one that amplifies
    "amplification by G'": [1, 1, 1, 0, 0, 0],
    "amplification at random": [0] * 6,
}
RUNS = [
    ("DDP", 2, 0),
    ("ZeroRedundancyOptimizer", 2, 0),
    ("FSDP2", 3, 1),
    ("HSDP", 4, 1),
    ("tensor parallel", 2, 1),
    ("FSDP2 and tensor parallel", 4, 1),
    ("FSDP2 and tensor parallel, one layer apart", 4, 2),
    ("FSDP1", 2, 1),
    ("FSDP1, NO_SHARD", 2, 0),
]
NAMES = list(ONE)
PARTS = []  # each way has one rule in every run of the tests, and each rule a way
for number, (way, world, meshes) in enumerate(RUNS):
    one = NAMES[number % len(NAMES)]
    rest = [name for name in NAMES if name != one]
    PARTS.append(pytest.param(way, world, meshes, [one], id=way))
    PARTS.append(pytest.param(way, world, meshes, rest, id=f"{way}, the other rules", marks=pytest.mark.full))


@pytest.mark.dist
@pytest.mark.parametrize(("way", "world", "meshes", "names"), PARTS)
def test_a_step_takes_one_collective_more_for_each_mesh(way, world, meshes, names):
    for found in run(world, count, way, names):
        for name in names:
            expected = ONE[name]
            bare, attached = found[name]
            more = [with_rule - without for without, with_rule in zip(bare, attached, strict=True)]
            if way == "tensor parallel" and name == "amplification by G'":
                # This optimizer forms gradients that arrive as sums over processes twice; formed for the rule, once.
                assert more == [-1, -1, -1, 0, 0, 0]
                continue
            assert more == [meshes * number for number in expected], name
