"""What a step dispatches, pinned: a change that costs operations fails here, on any machine, without a clock."""

from __future__ import annotations

import pytest
from benchmarks import memory
from benchmarks.counts import KINDS, LAYERS, step
from benchmarks.steps import counted

pytestmark = pytest.mark.usefixtures("few_objects")

# On a CUDA device, more than the bare step: each place measures (10), and "gradient" multiplies (1 for all); of a write
# without numbers, such as add_ of a list, the factors make one more. A capturable step scales with tensors.
MORE = {
    "SGD": (11, 11, 11),
    "SGD momentum, decay": (11, 11, 11),
    "SGD Nesterov": (11, 11, 11),
    "Adagrad": (11, 10, 10),
    "RMSprop": (11, 10, 10),
    "Adadelta": (11, 11, 11),
    "Adam": (11, 10, 10),
    "AdamW": (11, 10, 10),
    "AdamW, capturable": (12, 16, 16),
    "RAdam": (11, 10, 10),
    "NAdam": (11, 10, 10),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_an_accelerator_dispatches_so_many_operations_more(kind):
    bare, _ = step(kind, None)
    counts = [step(kind, place) for place in ("gradient", "lr", "update")]
    assert tuple(count - bare for count, _ in counts) == MORE[kind]
    assert [reads for _, reads in counts] == [0 if "capturable" in kind else 1] * 3
    assert LAYERS == 10


@pytest.mark.parametrize(("layers", "operations"), [(4, 9), (5, 2), (256, 2), (257, 10), (1000, 10)])
def test_on_the_cpu_so_many_operations_lie_between_the_gradients_and_the_factors(layers, operations):
    row = counted(layers)
    assert row["operations"] == operations
    assert row["reads"] == (8 if layers == 4 else 0), (
        "of few tensors the norms are read one by one, which waits for nothing"
    )


# Tensors that a step allocates beyond the bare one: the norms of 16 parameters, and what puts them together; small,
# however large the parameters are. LARS reads weights too; "update" copies nothing.
ALLOCATED = {
    "SGD, LayerAdaptive": (17, 128),
    "SGD, fused, LayerAdaptive": (17, 128),
    "AdamW, fused, LayerAdaptive": (17, 128),
    "SGD, fused, LARS": (33, 256),
    "SGD, LayerAdaptive, update": (17, 128),
    "SGD, all layers amplified": (0, 0),
}


@pytest.mark.parametrize("case", ALLOCATED)
def test_a_step_allocates_so_many_tensors_more(case):
    row = memory.more(case, width=16)
    assert (row["tensors_a_step"], row["bytes_a_step"]) == ALLOCATED[case]


@pytest.mark.parametrize("case", [case for case, (*_, target) in memory.CASES.items() if target == 0])
def test_nothing_stays_that_grows_with_the_parameters(case):
    small, large = (memory.more(case, width)["kept_bytes"] for width in (16, 64))
    assert small == large < 1000


@pytest.mark.parametrize(("measure", "numbers"), [("G", 1), ("G′", 2)])
def test_sums_of_gradients_take_a_number_a_parameter(measure, numbers):
    small, large = (memory.more(f"SGD, amplification by {measure}", width)["kept_bytes"] for width in (16, 64))
    parameters = [8 * (width * width + width) for width in (16, 64)]
    assert large - small == 4 * numbers * (parameters[1] - parameters[0])
