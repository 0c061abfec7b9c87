"""What a step dispatches, pinned: a change that costs operations fails here, on any machine, without a clock."""

from __future__ import annotations

import pytest
from benchmarks.counts import KINDS, LAYERS, step
from benchmarks.steps import counted

# On a CUDA device, more than the bare step: "gradient" measures (11) and multiplies (1 for all); "lr" measures and
# steps the group of each layer apart, at what the optimizer takes for a group; "update" copies 20 tensors.
MORE = {
    "SGD": (12, 19, 34),
    "SGD momentum, decay": (12, 46, 34),
    "SGD Nesterov": (12, 46, 34),
    "Adagrad": (12, 107, 34),
    "RMSprop": (12, 64, 34),
    "Adadelta": (12, 118, 34),
    "Adam": (12, 82, 34),
    "AdamW": (12, 91, 34),
    "AdamW, capturable": (12, 195, 34),
    "RAdam": (12, 243, 34),
    "NAdam": (12, 100, 34),
}
NO_READS = ("Adagrad", "AdamW, capturable", "RAdam")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_an_accelerator_dispatches_so_many_operations_more(kind):
    bare, _ = step(kind, None)
    counts = [step(kind, place) for place in ("gradient", "lr", "update")]
    assert tuple(count - bare for count, _ in counts) == MORE[kind]
    assert [reads for _, reads in counts] == [0, 0 if kind in NO_READS else 1, 0]
    assert LAYERS == 10


@pytest.mark.parametrize(("layers", "operations"), [(4, 9), (5, 2), (256, 2), (257, 10), (1000, 10)])
def test_on_the_cpu_so_many_operations_lie_between_the_gradients_and_the_factors(layers, operations):
    row = counted(layers)
    assert row["operations"] == operations
    assert row["reads"] == (8 if layers == 4 else 0), (
        "of few tensors the norms are read one by one, which waits for nothing"
    )
