"""G and G′ against float64 NumPy from the stored gradients, and what the sums cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from benchmarks.amplification import buffer_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
from layerwise.layers import Layer
from layerwise.rules.directionality import DirectionalitySums, z_scores
from layerwise.statistics import Gradients

MEASURES = ["G", "G_prime"]
both = pytest.mark.parametrize("measure", MEASURES)


def layers_of(shapes, dtype=torch.float64):
    """A layer for each list of shapes."""
    return [
        Layer(str(i), tuple(nn.Parameter(torch.zeros(s, dtype=dtype)) for s in row)) for i, row in enumerate(shapes)
    ]


def measured(layers, epoch, measure, *, sample=None, scales=None, skipped=None):
    """G or G′ of the gradients of an epoch: for each step one tensor a parameter."""
    sums = DirectionalitySums(layers, each_weight=measure == "G_prime", sample=sample)
    state = {}
    for number, gradients in enumerate(epoch):
        scale = None if scales is None else torch.tensor(scales[number])
        scaled = gradients if scale is None else [None if g is None else g * scale.to(g.dtype) for g in gradients]
        state = sums.add(state, Gradients(scaled, scale, None if skipped is None else torch.tensor(skipped[number])))
    return sums, state, sums.ratios(state)[0]


def expected(layers, epoch, measure):
    """The same by the reference."""
    steps = []
    for gradients in epoch:
        rows, position = [], 0
        for layer in layers:
            rows.append([g.double().numpy() for g in gradients[position : position + len(layer.parameters)]])
            position += len(layer.parameters)
        steps.append(rows)
    return reference.directionality(steps, measure)


def random_epoch(layers, steps, seed=0, dtype=torch.float64, drift=0.3):
    """Gradients with a direction of their own for each weight, and noise."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for layer in layers for p in layer.parameters]
    directions = [drift * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    noise = [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters] for _ in range(steps)]
    return [[(d + n).to(dtype) for d, n in zip(directions, row, strict=True)] for row in noise]


SHAPES = [[(20, 3, 3, 3), (20,)], [(30, 20)], [(30,), (30,)], [(7, 30), (7,)]]


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_both_measures_are_those_of_the_reference(measure, dtype, steps):
    layers = layers_of(SHAPES, dtype)
    epoch = random_epoch(layers, steps, dtype=dtype)
    np.testing.assert_allclose(measured(layers, epoch, measure)[2], expected(layers, epoch, measure), rtol=1e-6)


@both
def test_an_epoch_of_391_steps_in_float32_is_good_to_1e_6(measure):
    layers = layers_of([[(40, 30), (40,)], [(16,)], [(300, 40)]], torch.float32)
    epoch = random_epoch(layers, 391, dtype=torch.float32, drift=0.01)
    np.testing.assert_allclose(measured(layers, epoch, measure)[2], expected(layers, epoch, measure), rtol=1e-6)


@both
def test_a_layer_of_millions_of_float32_weights_is_good_to_1e_6(measure):
    layers = layers_of([[(1500, 1000), (1500,)]], torch.float32)
    epoch = random_epoch(layers, 5, dtype=torch.float32)
    parameters = [[g.double() for g in step] for step in epoch]
    signed = [sum(step[i] for step in parameters) for i in range(2)]
    absolute = [sum(step[i].abs() for step in parameters) for i in range(2)]
    wanted = {
        "G": sum(s.abs().sum() for s in signed) / sum(a.sum() for a in absolute),
        "G_prime": sum((s.abs() / a).sum() for s, a in zip(signed, absolute, strict=True)) / 1_501_500,
    }[measure]
    assert measured(layers, epoch, measure)[2] == pytest.approx([float(wanted)], rel=1e-6)


@both
def test_gradients_that_a_scaler_left_scaled_are_measured_unscaled(measure):
    layers = layers_of(SHAPES, torch.float32)
    epoch = random_epoch(layers, 6, dtype=torch.float32)
    _, _, values = measured(layers, epoch, measure, scales=[1024.0, 1024.0, 512.0, 512.0, 2.0**16, 1.0])
    np.testing.assert_allclose(values, expected(layers, epoch, measure), rtol=1e-6)


@both
@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, None], ids=["nan", "inf", "zero", "missing"])
def test_steps_that_do_not_count_change_nothing(measure, broken):
    layers = layers_of(SHAPES)
    epoch = random_epoch(layers, 5)
    spoiled = [g.clone() for g in epoch[0]]
    if broken is None:
        spoiled = [None] * len(spoiled)
    elif broken == 0.0:
        spoiled = [torch.zeros_like(g) for g in spoiled]
    else:
        spoiled[2].view(-1)[3] = broken
    sums, state, values = measured(layers, [spoiled, epoch[0], spoiled, *epoch[1:], spoiled], measure)
    assert values == measured(layers, epoch, measure)[2]
    assert state["iterations"].item() == 5
    assert sums.ratios({}) == ([0.0] * 4, [False] * 4)


@both
@pytest.mark.parametrize("sample", [None, 25])
def test_a_broken_gradient_in_a_weight_that_is_not_sampled_is_seen(measure, sample):
    layers = layers_of([[(100, 7)]])
    epoch = random_epoch(layers, 3)
    for position in (0, 1, 350, 699):
        spoiled = epoch[0][0].clone()
        spoiled.view(-1)[position] = math.nan
        _, state, values = measured(layers, [*epoch, [spoiled]], measure, sample=sample)
        assert state["iterations"].item() == 3
        assert values == measured(layers, epoch, measure, sample=sample)[2]


@both
def test_steps_that_the_scaler_skips_do_not_count_even_if_these_gradients_are_finite(measure):
    layers = layers_of(SHAPES)
    epoch = random_epoch(layers, 4)
    _, state, values = measured(layers, [*epoch, epoch[0]], measure, skipped=[0.0, 0.0, 0.0, 0.0, 1.0])
    assert values == pytest.approx(measured(layers, epoch, measure)[2], rel=1e-14)
    assert state["iterations"].item() == 4


@both
def test_a_missing_gradient_counts_as_zero_and_a_layer_without_any_is_told(measure):
    layers = layers_of(SHAPES)
    epoch = random_epoch(layers, 4)
    with_zeros = [
        [torch.zeros_like(g) if i in (1, 4, 5) and n % 2 else g for i, g in enumerate(e)] for n, e in enumerate(epoch)
    ]
    without = [[None if i in (1, 4, 5) and n % 2 else g for i, g in enumerate(e)] for n, e in enumerate(epoch)]
    assert measured(layers, without, measure)[2] == pytest.approx(expected(layers, with_zeros, measure), rel=1e-12)
    never = [[None if i in (3, 4) else g for i, g in enumerate(e)] for e in epoch]
    sums, state, _ = measured(layers, never, measure)
    assert sums.ratios(state)[1] == [True, True, False, True]


@both
def test_sparse_and_complex_gradients_are_those_of_their_numbers(measure):
    embedding = nn.Parameter(torch.zeros(6, 3, dtype=torch.float64))
    wave = nn.Parameter(torch.zeros(4, dtype=torch.complex128))
    layers = [Layer("embedding", (embedding,)), Layer("wave", (wave,))]
    generator = torch.Generator().manual_seed(0)
    epoch = []
    for _ in range(4):
        indices = torch.randint(0, 6, (1, 5), generator=generator)
        values = torch.randn(5, 3, dtype=torch.float64, generator=generator)
        sparse = torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)
        epoch.append([sparse, torch.randn(4, dtype=torch.complex128, generator=generator)])
    plain = [[[sparse.to_dense().numpy()], [torch.view_as_real(w).numpy()]] for sparse, w in epoch]
    assert measured(layers, epoch, measure)[2] == pytest.approx(reference.directionality(plain, measure), rel=1e-12)


# --- The properties of the measures -----------------------------------------------------------------------------------

EPOCHS = st.integers(1, 6).flatmap(
    lambda steps: st.lists(
        st.lists(st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-6 else 0.0), min_size=6, max_size=6),
        min_size=steps,
        max_size=steps,
    )
)


def of_lists(epoch):
    layers = layers_of([[(2,), (1,)], [(3,)]])
    steps = [torch.tensor(row, dtype=torch.float64) for row in epoch]
    return layers, [[row[:2], row[2:3], row[3:]] for row in steps]


@both
@given(EPOCHS)
@settings(deadline=None, max_examples=60)
def test_values_lie_from_0_to_1_and_are_those_of_the_reference(measure, epoch):
    layers, steps = of_lists(epoch)
    values = measured(layers, steps, measure)[2]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    counted = [row for row in steps if any(g.any() for g in row)] or steps
    np.testing.assert_allclose(values, expected(layers, counted, measure), rtol=1e-9, atol=1e-12)


@both
@given(EPOCHS, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=60)
def test_a_constant_amplification_of_a_layer_changes_nothing(measure, epoch, first, second):
    layers, steps = of_lists(epoch)
    scaled = [[a * first, b * first, c * second] for a, b, c in steps]
    np.testing.assert_allclose(
        measured(layers, scaled, measure)[2], measured(layers, steps, measure)[2], rtol=1e-9, atol=1e-12
    )


@both
def test_one_step_and_gradients_of_constant_sign_give_1(measure):
    layers = layers_of(SHAPES)
    epoch = random_epoch(layers, 8)
    np.testing.assert_allclose(measured(layers, epoch[:1], measure)[2], 1.0, rtol=1e-12)
    signed = [[g.abs() * d.sign() for g, d in zip(row, epoch[0], strict=True)] for row in epoch]
    np.testing.assert_allclose(measured(layers, signed, measure)[2], 1.0, rtol=1e-12)


@pytest.mark.parametrize("steps", [16, 100, 391])
def test_noise_without_a_direction_gives_about_one_over_the_root_of_the_steps(steps):
    layers = layers_of([[(60, 60)]])
    epoch = random_epoch(layers, steps, drift=0.0)
    for measure in MEASURES:
        assert measured(layers, epoch, measure)[2][0] == pytest.approx(1 / math.sqrt(steps), rel=0.05)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_z_is_that_of_numpy_and_within_its_bounds(values, ddof):
    z = z_scores(values, [True] * len(values), ddof)
    count = len(values)
    limit = math.sqrt(count - 1) if ddof == 0 else (count - 1) / math.sqrt(count)
    assert max(map(abs, z)) <= limit * (1 + 1e-9)
    if np.std(values) > 2e-6:
        np.testing.assert_allclose(z, reference.z_scores(values, ddof), rtol=1e-6, atol=1e-9)


def test_layers_that_are_not_live_do_not_distort_z():
    values, live = [0.1, 0.9, 0.3, 0.0], [True, False, True, False]
    assert z_scores(values, live) == pytest.approx([-1.0, 0.0, 1.0, 0.0])
    assert z_scores([0.3, 0.3, 0.3], [True] * 3) == [0.0] * 3
    assert z_scores([0.3, 0.4], [True, False]) == [0.0, 0.0]


# --- What it costs ----------------------------------------------------------------------------------------------------


def test_the_first_measure_takes_a_buffer_a_parameter_and_the_second_two_and_a_sample_takes_its_share():
    layers = layers_of([[(100, 100), (100,)], [(50, 100)]], torch.float32)
    numbers, epoch = 15_100, random_epoch(layers, 2, dtype=torch.float32)
    small = 8 * 3 + 8  # a sum a parameter tensor, and the number of steps
    assert buffer_bytes(measured(layers, epoch, "G")[1]) == 4 * numbers + small
    assert buffer_bytes(measured(layers, epoch, "G_prime")[1]) == 2 * 4 * numbers + 8
    assert buffer_bytes(measured(layers, epoch, "G", sample=200)[1]) == 4 * 2 * 200 + small
    assert buffer_bytes(measured(layers, epoch, "G_prime", sample=200)[1]) == 2 * 4 * 2 * 200 + 8


@both
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_sample_estimates_the_measure_and_takes_the_same_weights_whatever_the_layout(measure, memory_format):
    parameter = nn.Parameter(torch.zeros(96, 64, 3, 3).to(memory_format=memory_format))
    layers = [Layer("conv", (parameter,))]
    epoch = random_epoch(layers, 20, dtype=torch.float32, drift=0.2)
    laid_out = [[g.to(memory_format=memory_format) for g in row] for row in epoch]
    exact = measured(layers, epoch, measure)[2][0]
    estimate = measured(layers, laid_out, measure, sample=4096)[2][0]
    assert estimate == pytest.approx(exact, rel=0.03)
    assert estimate != exact
    assert measured(layers, epoch, measure, sample=4096)[2][0] == pytest.approx(estimate, rel=1e-6)


@both
def test_adding_reads_no_value_from_an_accelerator(measure):
    with FakeTensorMode():
        parameters = tuple(nn.Parameter(torch.empty(s, device="cuda")) for s in [(4, 3), (4,)])
        for sample in (None, 5):
            sums = DirectionalitySums([Layer("", parameters)], each_weight=measure == "G_prime", sample=sample)
            state = {}
            for _ in range(2):
                gradients = [torch.empty_like(p) for p in parameters]
                scale, skipped = torch.empty((), device="cuda"), torch.empty((), device="cuda")
                state = sums.add(state, Gradients(gradients, scale, skipped))
            assert all(buffer.device.type == "cuda" for buffer in state["signed"].values())


# --- Saved sums -------------------------------------------------------------------------------------------------------


@both
def test_saved_sums_go_on_where_they_were_and_foreign_ones_are_refused(measure):
    layers = layers_of(SHAPES)
    epoch = random_epoch(layers, 6)
    sums, half, _ = measured(layers, epoch[:3], measure)
    copy = sums.loaded(half)
    whole = measured(layers, epoch, measure)[2]
    for gradients in epoch[3:]:
        copy = sums.add(copy, Gradients(gradients))
    assert sums.ratios(copy)[0] == whole
    assert half["iterations"].item() == 3
    with pytest.raises(ValueError, match="must hold signed, absolute, received by parameter"):
        sums.loaded({"signed": {}})
    with pytest.raises(ValueError, match="no parameter here"):
        DirectionalitySums(layers[:1], each_weight=measure == "G_prime").loaded(half)
    with pytest.raises(ValueError, match="have shape"):
        DirectionalitySums(layers, each_weight=measure != "G_prime").loaded(half)


@both
def test_a_broken_form_of_saved_sums_is_refused(measure):
    layers = layers_of(SHAPES)
    sums, half, _ = measured(layers, random_epoch(layers, 2), measure)
    for spoiled in ({**half, "signed": None}, {**half, "signed": []}, {**half, "iterations": torch.zeros(3)}, None):
        with pytest.raises(ValueError, match="the saved sums"):
            sums.loaded(spoiled)


@both
def test_what_is_wrong_with_saved_sums_is_said(measure):
    layers = layers_of(SHAPES)
    sums, half, _ = measured(layers, random_epoch(layers, 2), measure)
    for part in ("absolute", "received"):
        fewer = dict(list(half[part].items())[1:])
        with pytest.raises(ValueError, match=f"of different parameters in 'signed' and '{part}'"):
            sums.loaded({**half, part: fewer})
    for iterations in (2, torch.ones(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="the saved sums hold no number of iterations"):
            sums.loaded({**half, "iterations": iterations})
    with pytest.raises(ValueError, match="must hold signed, absolute, received by parameter, and iterations"):
        sums.loaded({**half, "squared": {}})
    with pytest.raises(ValueError, match=r"the saved sums of '/.*' have shape float, here \(.*\); same rule\?"):
        sums.loaded({**half, "signed": dict.fromkeys(half["signed"], 1.0)})


@both
@pytest.mark.parametrize("size", [1e-24, 1e19])
@pytest.mark.parametrize("sample", [None, 100])
def test_tiny_and_huge_float32_gradients_count(measure, size, sample):
    layers = layers_of([[(30, 20)]], torch.float32)
    epoch = random_epoch(layers, 4, dtype=torch.float32)
    scaled = [[g * size for g in row] for row in epoch]
    _, state, values = measured(layers, scaled, measure, sample=sample)
    assert state["iterations"].item() == 4
    assert values == pytest.approx(measured(layers, epoch, measure, sample=sample)[2], rel=1e-5)


@pytest.mark.parametrize("sample", [None, 3])
@both
def test_finite_gradients_whose_sum_float32_cannot_hold_do_not_count(measure, sample):
    """One such step made an infinity of a sum and NaN of every ẑ, so that no layer was chosen."""
    layers = layers_of([[(4,)], [(4,)]], torch.float32)
    epoch = random_epoch(layers, 5, dtype=torch.float32)
    for step in (1, 2, 3):
        epoch[step][0][0] = 3e38
    _, state, values = measured(layers, epoch, measure, sample=sample)
    assert state["iterations"].item() == 2
    alone = [epoch[0], epoch[4]]
    assert values == measured(layers, alone, measure, sample=sample)[2]
    if sample is None:
        assert values == pytest.approx(expected(layers, alone, measure), rel=1e-6)


@pytest.mark.parametrize("sample", [None, 100])
@pytest.mark.parametrize("others", [torch.float16, torch.float32])
@both
def test_a_float16_layer_whose_absolute_values_add_up_to_more_than_float16_can_hold_counts(measure, sample, others):
    layers = layers_of([[(2000,)], [(3,)]], torch.float16)
    epoch = [[torch.full((2000,), 100.0).half(), torch.ones(3, dtype=others)] for _ in range(2)]
    _, state, values = measured(layers, epoch, measure, sample=sample)
    assert state["iterations"].item() == 2
    assert values == [1.0, 1.0]


@pytest.mark.parametrize("sample", [None, 50])
@both
def test_complex_gradients_of_constant_sign_give_1_and_their_sums_can_be_loaded(measure, sample):
    layers = [Layer("wave", (nn.Parameter(torch.zeros(200, dtype=torch.complex64)),))]
    sums, state, values = measured(layers, [[torch.full((200,), 1 + 2j)]] * 3, measure, sample=sample)
    assert values == pytest.approx([1.0])
    assert sums.ratios(sums.loaded(state))[0] == values


def test_rounding_dust_of_float32_is_no_spread():
    layers = layers_of([[(64, 64), (64,)] for _ in range(8)], torch.float32)
    for steps in (1, 3):
        epoch = [[g.abs() for g in row] for row in random_epoch(layers, steps, dtype=torch.float32)]
        assert z_scores(measured(layers, epoch, "G")[2], [True] * 8) == [0.0] * 8


def test_only_the_measured_layers_take_memory_and_all_tell_whether_a_step_counts():
    layers = layers_of([[(10, 10)], [(100, 100)]], torch.float32)
    sums = DirectionalitySums(layers, each_weight=True, measured=[True, False])
    epoch = random_epoch(layers, 2, dtype=torch.float32)
    state = sums.add({}, Gradients(epoch[0]))
    assert buffer_bytes(state) == 2 * 4 * 100 + 8
    epoch[1][1][0, 0] = math.nan
    assert sums.add(state, Gradients(epoch[1]))["iterations"].item() == 1


@both
def test_a_layer_with_gradients_in_skipped_steps_alone_has_received_none(measure):
    layers = layers_of([[(3,)], [(3,)]])
    epoch = [[torch.ones(3), None], [torch.ones(3), torch.ones(3)], [torch.ones(3), None]]
    sums, state, _ = measured(layers, epoch, measure, skipped=[0.0, 1.0, 0.0])
    assert sums.ratios(state)[1] == [True, False]


@both
def test_a_parameter_of_another_shape_begins_anew(measure):
    layers = layers_of([[(3,)], [(2,)]])
    _, state, _ = measured(layers, [[torch.ones(3), torch.ones(2)]], measure)
    grown = layers_of([[(3,)], [(4,)]])
    sums = DirectionalitySums(grown, each_weight=measure == "G_prime")
    state = sums.add(state, Gradients([-torch.ones(3), torch.ones(4)]))
    assert sums.ratios(state)[0] == [0.0, 1.0]


def test_sums_read_from_a_file_go_on_where_the_gradients_are():
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(4, device="cuda"))
        for each_weight in (False, True):
            sums = DirectionalitySums([Layer("", (parameter,))], each_weight=each_weight)
            state = sums.add({}, Gradients([torch.empty(4, device="cuda")]))
            saved = {
                part: {k: torch.zeros(b.shape, dtype=b.dtype) for k, b in state[part].items()}
                for part in ("signed", "absolute", "received")
            }
            saved["iterations"] = torch.zeros((), dtype=torch.int64)
            state = sums.add(sums.loaded(saved), Gradients([torch.empty(4, device="cuda")]))
            assert state["iterations"].device.type == "cuda"
            assert state["signed"]["/.0"].device.type == "cuda"


@both
@pytest.mark.parametrize("sample", [None, 10])
def test_layers_of_different_types_and_empty_parameters_are_measured_together(measure, sample):
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    layers = [Layer(str(kind), (nn.Parameter(torch.zeros(50, dtype=kind)),)) for kind in kinds]
    layers.append(Layer("empty", (nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(30)))))
    one = [torch.ones_like(p) for layer in layers for p in layer.parameters]
    assert measured(layers, [one] * 3, measure, sample=sample)[2] == [1.0] * 5
