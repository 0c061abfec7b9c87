"""Which findings follow from which numbers of layers."""

from __future__ import annotations

import math

import pytest

from layerwise.lab.tasks import findings
from layerwise.lab.tasks.findings import find, numbers_of
from layerwise.sinks import Record

NAMES = ("in", "middle", "out")


def record(step=1, gradient=(1.0, 1.0, 1.0), weight=(10.0, 10.0, 10.0), ratio=(1e-3, 1e-3, 1e-3)):
    """Make a record of three layers, healthy where nothing else is said."""
    updates = [r * w for r, w in zip(ratio, weight, strict=True)]
    return Record(step, NAMES, list(gradient), list(weight), updates, [1.0] * 3, [0.1] * 3, list(ratio))


def kinds(found):
    return [(finding.kind, finding.layers, finding.serious) for finding in found]


def test_healthy_layers_give_no_finding():
    assert find([record(step) for step in range(1, 6)]) == []
    assert find([]) == []


@pytest.mark.parametrize(
    ("numbers", "kind", "layers", "serious"),
    [
        ({"gradient": (0, 1, 1)}, "dead", ("in",), True),
        ({"gradient": (0, 0, 1)}, "dead", ("middle", "in"), True),
        ({"gradient": (0.9e-4, 1, 1)}, "vanishing", ("in",), True),
        ({"gradient": (1.1e-4, 1, 1)}, None, (), False),
        ({"gradient": (301, 301, 301)}, "exploding", ("out", "middle", "in"), True),
        ({"gradient": (101, 1, 1)}, "exploding", ("in",), False),
        ({"gradient": (101, 1, 1), "ratio": (0.02, 1e-3, 1e-3)}, "exploding", ("in",), True),
        ({"gradient": (99, 1, 1)}, None, (), False),
        ({"ratio": (1e-3, 1e-3, 0.011)}, "fast", ("out",), False),
        ({"ratio": (0.02, 1e-3, 0.031)}, "fast", ("out", "in"), True),
        ({"ratio": (0.01, 1e-3, 1e-4)}, None, (), False),
        ({"ratio": (0.9e-4, 1e-3, 1e-3)}, "slow", ("in",), False),
        ({"ratio": (3.2e-5, 5e-5, 1e-3)}, "slow", ("in", "middle"), True),
        ({"ratio": (0, 1e-3, 1e-3)}, "unmoved", ("in",), True),
        ({"gradient": (0, 1, 1), "ratio": (0, 1e-3, 1e-3)}, "dead", ("in",), True),
        ({"gradient": (1e-6, 1, 1), "ratio": (1e-9, 1e-5, 1e-3)}, "vanishing", ("in",), True),
        ({"gradient": (5000, 1, 1), "ratio": (3, 0.5, 0.5)}, "exploding", ("in",), True),
    ],
)
def test_a_fault_gives_its_finding_and_what_follows_from_it_none(numbers, kind, layers, serious):
    expected = [] if kind is None else [(kind, layers, serious)]
    assert kinds(find([record(step, **numbers) for step in (1, 2, 3)])) == expected


def test_one_update_that_is_otherwise_changes_nothing_but_a_dead_layer_is_not_dead():
    healthy = [record(1), record(2), record(3)]
    assert find([*healthy, record(4, ratio=(1, 1, 1), gradient=(1e5, 1e5, 1e5))]) == []
    dead = [record(step, gradient=(0, 1, 1)) for step in (1, 2, 3)]
    assert kinds(find(dead)) == [("dead", ("in",), True)]
    assert find([*dead, record(4)]) == []


def test_a_layer_that_dies_is_judged_by_how_it_lived():
    lived = [record(step, ratio=(0.5, 1e-3, 1e-3)) for step in (1, 2)]
    died = [record(step, gradient=(0, 1, 1), ratio=(1e-7, 1e-3, 1e-3)) for step in (3, 4)]
    dead, fast = find([*lived, *died])
    assert dead.sentence == "layers are dead: no gradient from update 3 in 'in' (to the end)"
    assert fast.values == (0.5,)
    (fast,) = find([record(0), *lived, *died])  # less than half
    assert fast.kind == "fast"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_layer_and_update_that_are_not_finite_are_told(value):
    broken = record(3, gradient=(1, value, value))
    (found,) = find([record(1), record(2), broken, record(4, gradient=(value,) * 3)], diverged_at=2)
    assert (found.kind, found.layers, found.serious) == ("non-finite", ("middle", "out"), True)
    assert found.sentence == (
        f"numbers are not finite from update 3 on: ‖g‖ {value} in 'middle', {value} in 'out' (must be finite)"
    )


def test_what_was_before_the_first_number_that_is_not_finite_is_told_too():
    broken = record(2, gradient=(math.nan,) * 3)
    assert [finding.kind for finding in find([record(1, ratio=(0.5, 0.5, 0.5)), broken])] == ["non-finite", "fast"]


def test_an_update_that_is_not_finite_blames_the_rate():
    (found,) = find([record(1, ratio=(math.inf, 1e-3, 1e-3))])
    assert "lower the rate" in found.remedy


def test_a_loss_alone_that_is_not_finite_is_told():
    (found,) = find([record(1)], diverged_at=1)
    assert found.sentence == "the loss is not finite from update 2 on (must be finite)"


def test_frozen_layers_are_a_note_and_judged_by_nothing_else():
    still = [record(step, gradient=(0, 1, 1), ratio=(0, 1e-3, 1e-3)) for step in (1, 2)]
    (found,) = find(still, frozen=["in"])
    assert (found.kind, found.serious, found.sentence) == (
        "frozen", False, "layers are frozen: 'in' (requires_grad=False)",
    )  # fmt: skip


def test_layers_without_any_gradient_are_left_to_who_tells_of_them():
    assert find([record(1, gradient=(0, 1, 1))], ungiven=["in"]) == []


def test_weights_that_begin_at_zero_are_not_judged_by_their_first_growth():
    grown = [
        record(1, weight=(0, 10, 10), ratio=(0, 1e-3, 1e-3)),
        record(2, weight=(1e-4, 10, 10), ratio=(5, 1e-3, 1e-3)),
    ]
    assert find([*grown, *grown[1:]]) == []


def test_problems_come_before_notes_and_long_lists_are_cut():
    names = tuple(f"layer{number}" for number in range(8))
    many = Record(1, names, [0.0] * 6 + [1.0] * 2, [10.0] * 8, [0.0] * 6 + [0.2] * 2, [1.0] * 8, [0.1] * 8, [0.02] * 8)
    dead, fast = find([many])
    assert (dead.serious, fast.serious) == (True, False)
    assert "from update 1 in 'layer5', 1 in 'layer4'" in dead.sentence
    assert dead.sentence.endswith("and 1 more (to the end)")


def test_the_medians_are_those_of_the_finite_records():
    rows = [record(1, gradient=(1, 1, 1)), record(2, gradient=(5, 1, 1)), record(3, gradient=(2, 1, 1))]
    first = numbers_of([*rows, record(4, gradient=(math.nan, 1, 1)), record(5, gradient=(9, 1, 1))])[0]
    assert (first.gradient, first.weight, first.relative_gradient) == (2, 10, 0.2)


def test_the_page_on_the_doctor_has_the_limits():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for limit in (findings.LOW_RATIO, findings.HIGH_RATIO, findings.EXPLODING, findings.VANISHING, findings.FAR):
        assert f"{limit:g}" in page
    for kind in ("non-finite", "exploding", "vanishing", "dead", "unmoved", "fast", "slow", "frozen"):
        assert f"`{kind}`" in page
