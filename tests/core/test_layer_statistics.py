"""The statistics against float64 NumPy, and that computing them waits for no device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
import reference
from layerwise.apply import Factors
from layerwise.layers import Layer, make_layers
from layerwise.rules import Rule
from layerwise.statistics import AS_NUMBERS, NEEDS, OF_STEP, LayerStatistics
from slow_norms import arrays, layer_norm

NORMS = ("gradient_norm", "weight_norm", "matrix_norm", "decay_norm")


def compute(layers, groups, *needs, grad_scale=None):
    with torch.no_grad():
        return LayerStatistics(layers, needs).compute(groups, grad_scale)


def layers_with_gradients(shapes, dtype=torch.float64, gradients=True):
    """Return a layer for each list of shapes, and one parameter group that holds all of them."""
    layers = []
    for number, layer in enumerate(shapes):
        parameters = tuple(nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in layer)
        for p in parameters:
            p.grad = torch.randn_like(p) if gradients else None
        layers.append(Layer(str(number), parameters))
    members = [p for layer in layers for p in layer.parameters]
    return layers, [{"params": members, "lr": 0.1, "weight_decay": 0.01}]


SHAPES = st.lists(
    st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(SHAPES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]))
@settings(deadline=None, max_examples=50)
def test_all_norms_are_those_of_numpy_whatever_the_shapes_and_the_type(shapes, dtype):
    layers, groups = layers_with_gradients(shapes, dtype)
    statistics = compute(layers, groups, *NORMS)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for index, layer in enumerate(layers):
        weights, gradients = arrays(layer.parameters), arrays([p.grad for p in layer.parameters])
        expected = {
            "gradient_norm": layer_norm(gradients),
            "weight_norm": layer_norm(weights),
            "matrix_norm": layer_norm([w for w in weights if w.ndim > 1]),
            "decay_norm": 0.01 * layer_norm(weights),
        }
        for name, value in expected.items():
            actual = getattr(statistics, name)
            assert actual.dtype is torch.float64
            assert actual.shape == (len(layers),)
            assert float(actual[index]) == pytest.approx(value, rel=tolerance, abs=1e-30), name


def test_repeated_entries_of_a_sparse_gradient_are_summed_first():
    p = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
    values = torch.randn(3, 2, dtype=torch.float64)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), values, (4, 2), check_invariants=True)
    assert not p.grad.is_coalesced()
    norm = compute([Layer("", (p,))], [{"params": [p], "lr": 1.0}], "gradient_norm").gradient_norm
    assert norm.tolist() == pytest.approx([layer_norm([p.grad.to_dense().numpy()])], rel=1e-14)
    assert not p.grad.is_coalesced(), "the gradient itself must stay as it came"


def test_an_empty_sparse_gradient_has_norm_zero():
    p = nn.Parameter(torch.zeros(4, 2))
    p.grad = torch.zeros(4, 2).to_sparse()
    norm = compute([Layer("", (p,))], [{"params": [p], "lr": 1.0}], "gradient_norm").gradient_norm
    assert norm.tolist() == [0.0]


def test_a_layer_of_mixed_types_and_a_sparse_part_has_one_norm():
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
    parameters = [nn.Parameter(torch.randn(3, 2, dtype=kind)) for kind in kinds]
    for p in parameters:
        p.grad = torch.randn_like(p)
    parameters[0].grad = parameters[0].grad.to_sparse()
    dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in parameters]
    groups = [{"params": [p], "lr": 1.0} for p in parameters]
    layers = [Layer("a", tuple(parameters[:3])), Layer("b", tuple(parameters[3:]))]
    norms = compute(layers, groups, "gradient_norm").gradient_norm
    expected = [layer_norm(arrays(dense[:3])), layer_norm(arrays(dense[3:]))]
    assert norms.tolist() == pytest.approx(expected, rel=1e-6)


def test_missing_gradients_count_as_nothing_and_may_come_back():
    layers, groups = layers_with_gradients([[(3, 2), (3,)], [(2,)], [(2, 2)]])
    statistics = LayerStatistics(layers, ["gradient_norm"])
    kept = [p.grad for p in groups[0]["params"]]
    for missing in ([], [1, 2], [0, 1, 2, 3], [3], []):
        for number, (p, gradient) in enumerate(zip(groups[0]["params"], kept, strict=True)):
            p.grad = None if number in missing else gradient
        expected = [layer_norm(arrays([p.grad for p in layer.parameters if p.grad is not None])) for layer in layers]
        assert statistics.compute(groups).gradient_norm.tolist() == pytest.approx(expected, rel=1e-13)


def test_the_scale_of_a_gradient_scaler_is_divided_out():
    layers, groups = layers_with_gradients([[(3, 2)], [(2,)]], torch.float32)
    expected = [layer_norm(arrays([layer.parameters[0].grad])) for layer in layers]
    for p in groups[0]["params"]:
        p.grad *= 1024
    actual = compute(layers, groups, "gradient_norm", grad_scale=torch.tensor(1024.0)).gradient_norm
    assert actual.tolist() == pytest.approx(expected, rel=1e-6)


def test_each_parameter_has_the_decay_and_the_rate_of_its_own_group():
    layers, _ = layers_with_gradients([[(3, 2), (3,)], [(2,)], [(2, 2)]])
    (w, b), (c,), (d,) = (layer.parameters for layer in layers)
    groups = [
        {"params": [w, d], "lr": 0.1, "weight_decay": 0.5},
        {"params": [b], "lr": 0.3, "weight_decay": 0.0},
        {"params": [c], "lr": 0.2},
    ]
    statistics = compute(layers, groups, "decay_norm", "learning_rate")
    expected = [0.5 * layer_norm(arrays([w])), 0.0, 0.5 * layer_norm(arrays([d]))]
    assert statistics.decay_norm.tolist() == pytest.approx(expected, rel=1e-14)
    assert statistics.learning_rate.tolist() == [0.3, 0.2, 0.1]


def test_a_rate_that_changes_is_read_again_also_when_it_is_a_tensor():
    layers, groups = layers_with_gradients([[(2,)], [(3,)]])
    statistics = LayerStatistics(layers, ["learning_rate"])
    for rate in (0.1, 0.1, 0.05, torch.tensor(0.25), torch.tensor(0.5, dtype=torch.float64)):
        groups[0]["lr"] = rate
        assert statistics.compute(groups).learning_rate.tolist() == [float(rate)] * 2


def test_the_gain_of_a_normalisation_is_its_squared_scale_over_the_running_variance():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False))
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 2)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    layers = make_layers(dict(model.named_parameters()), "module", model)
    groups = [{"params": list(model.parameters()), "lr": 1.0}]
    gain = compute(layers, groups, "normalisation_gain").normalisation_gain
    batch, variance, layer = arrays([model[1].weight, model[1].running_var, model[2].weight])
    expected = [1.0, np.mean(batch**2 / (variance + 1e-5)), np.mean(layer**2)]
    assert gain.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("fill", "counts"), [(1.0, True), (0.0, False), (math.nan, False), (math.inf, False), (None, False)]
)
def test_a_step_counts_unless_its_gradients_are_zero_missing_or_not_finite(fill, counts):
    layers, groups = layers_with_gradients([[(3, 2), (3,)], [(2,)]])
    for p in groups[0]["params"]:
        p.grad = None if fill is None else torch.full_like(p, fill)
    assert compute(layers, groups, "counts").counts.item() is counts


def test_one_broken_gradient_makes_a_step_not_count_and_one_zero_gradient_does_not():
    layers, groups = layers_with_gradients([[(3, 2), (3,)], [(2,)]])
    layers[1].parameters[0].grad.zero_()
    assert compute(layers, groups, "counts").counts.item() is True
    layers[1].parameters[0].grad[0] = math.inf
    assert compute(layers, groups, "counts").counts.item() is False


# --- Moments of gradients ---------------------------------------------------------------------------------------------


def moments(layers, groups, **arguments):
    """Return the measured mean and standard deviation of each layer's gradient."""
    found = compute(layers, groups, "gradient_mean", "gradient_std", **arguments)
    return found.gradient_mean.tolist(), found.gradient_std.tolist()


def moments_by_hand(layers):
    """Return the same in loops; real and imaginary parts are numbers of their own."""
    found = []
    for layer in layers:
        dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in layer.parameters if p.grad is not None]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in dense]
        count = sum(p.numel() * (2 if p.is_complex() else 1) for p in layer.parameters)
        found.append(reference.gradient_moments([g.double().numpy() for g in real], count))
    return found


def assert_moments(layers, groups, tolerance, **arguments):
    for mean, deviation, (wanted, spread) in zip(
        *moments(layers, groups, **arguments), moments_by_hand(layers), strict=True
    ):
        assert mean == pytest.approx(wanted, rel=tolerance, abs=tolerance * (0 if math.isnan(spread) else spread))
        assert deviation == pytest.approx(spread, rel=tolerance, nan_ok=True)


@given(SHAPES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]))
@settings(deadline=None, max_examples=50)
def test_moments_of_gradients_are_those_of_loops_whatever_the_shapes_and_the_type(shapes, dtype):
    layers, groups = layers_with_gradients(shapes, dtype)
    assert_moments(layers, groups, 1e-12)  # copies are in float64, narrow types too
    groups[0]["params"][0].grad = None
    assert_moments(layers, groups, 1e-12)


@pytest.mark.parametrize("shape", [(2**18 + 3,), (700, 1001), (3, 2**18 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_moments_of_gradients_that_are_measured_in_pieces(shape, dtype):
    layers, groups = layers_with_gradients([[shape, (5,)], [(7,)]], dtype)
    layers[0].parameters[0].grad = (
        layers[0].parameters[0].grad.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).mul(3).add(1)
    )
    assert_moments(layers, groups, 1e-12)


@pytest.mark.parametrize(("offset", "tolerance"), [(1e3, 1e-12), (1e6, 1e-12), (1e9, 1e-9)])
def test_a_mean_far_above_the_deviation_costs_few_digits(offset, tolerance):
    """The mean of squares less the square of the mean would have none left at 1e9."""
    layers, groups = layers_with_gradients([[(300, 7), (5,)], [(11,)]])
    for p in groups[0]["params"]:
        p.grad += offset
    assert_moments(layers, groups, tolerance)
    gradient = layers[0].parameters[0].grad
    assert offset < 1e9 or abs(float(gradient.square().mean() - gradient.mean().square()) - 1) > 0.1


def test_a_missing_gradient_counts_as_zeros_in_moments_and_so_do_gaps_of_a_sparse_one():
    layers, groups = layers_with_gradients([[(3, 2), (3,)], [(4, 2)], [(2,)]])
    layers[0].parameters[1].grad = None
    indices, values = torch.tensor([[1, 3, 1]]), torch.randn(3, 2, dtype=torch.float64)
    layers[1].parameters[0].grad = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)
    layers[2].parameters[0].grad = None
    assert_moments(layers, groups, 1e-13)
    assert moments(layers[2:], groups) == ([0.0], [0.0])
    for p in groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    assert moments(layers, groups) == ([0.0] * 3, [0.0] * 3)


def test_a_layer_of_one_number_has_no_deviation_and_its_factor_acts_as_1():
    layers, groups = layers_with_gradients([[(1,)], [(2,)]])
    mean, deviation = moments(layers, groups)
    assert mean[0] == float(layers[0].parameters[0].grad)
    assert math.isnan(deviation[0])
    assert deviation[1] > 0

    class Spread(Rule):
        needs = ("gradient_std",)

        def factors(self, statistics, state):
            return 2 + statistics.gradient_std, state

    parameters = groups[0]["params"]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Spread(), layers={"one": parameters[:1], "two": parameters[1:]})
    optimizer.step()
    assert adapter.get_last_factors() == {"one": 1.0, "two": pytest.approx(2 + deviation[1], rel=1e-14)}


def test_a_gradient_that_is_not_finite_has_no_moments_and_spoils_no_other_layer():
    layers, groups = layers_with_gradients([[(3, 2)], [(2,)]])
    layers[0].parameters[0].grad[1, 1] = math.inf
    mean, deviation = moments(layers, groups)
    assert not math.isfinite(mean[0])
    assert math.isnan(deviation[0])
    assert_moments(layers[1:], groups, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_scale_of_a_gradient_scaler_is_divided_out_of_moments(dtype):
    layers, groups = layers_with_gradients([[(3, 2)], [(2,)]], dtype)
    plain = moments(layers, groups)
    for p in groups[0]["params"]:
        p.grad *= 1024
    scaled = moments(layers, groups, grad_scale=torch.tensor(1024.0))
    assert scaled == (pytest.approx(plain[0], rel=1e-14), pytest.approx(plain[1], rel=1e-14))


class Operations(TorchDispatchMode):
    """Records the operations that reach a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def operations_of(need, number, dtypes):
    """Return the operations that one computation takes for so many layers of a matrix and a vector."""
    layers = []
    for index in range(number):
        parameters = [nn.Parameter(torch.randn(s, dtype=d)) for s, d in zip([(3, 2), (3,)], dtypes, strict=True)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        layers.append(Layer(str(index), tuple(parameters)))
    groups = [{"params": [p for layer in layers for p in layer.parameters], "lr": 0.1, "weight_decay": 0.01}]
    statistics = LayerStatistics(layers, [need])
    with torch.no_grad(), Operations() as operations:
        statistics.compute(groups)
    assert not [name for name in operations.names if "_local_scalar_dense" in name]
    return operations.names


@pytest.mark.parametrize("need", NORMS)
def test_the_number_of_operations_does_not_grow_with_the_layers(need):
    few, many = (operations_of(need, number, [torch.float32, torch.float32]) for number in (4, 300))
    assert few == many
    assert len(many) <= 12


@pytest.mark.parametrize("need", NORMS)
def test_the_number_of_operations_does_not_grow_with_the_layers_of_mixed_types(need):
    few, many = (operations_of(need, number, [torch.bfloat16, torch.float32]) for number in (4, 300))
    assert few == many


class OnDevice(nn.Module):
    """A linear layer's parameters on a device that need not exist."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device="cuda"))
        self.bias = nn.Parameter(torch.empty(outputs, device="cuda", dtype=torch.bfloat16))


@pytest.fixture
def imagined_accelerator():
    """Tensors without numbers that claim to be on a GPU: reading one raises."""
    with FakeTensorMode() as mode:
        with pytest.raises(DataDependentOutputException):
            torch.ones(1, device="cuda").item()
        yield mode


@pytest.mark.parametrize("need", NEEDS)
def test_no_statistic_reads_a_value_from_the_device(imagined_accelerator, need):
    model = nn.Sequential(OnDevice(4, 3), OnDevice(3, 2))
    parameters = list(model.parameters())
    layers = make_layers(dict(model.named_parameters()), "module", model)
    statistics = LayerStatistics(layers, [need])
    groups = [{"params": parameters, "lr": 0.1, "weight_decay": 0.1}]
    for missing in (None, parameters[1], None):
        for p in parameters:
            p.grad = None if p is missing else torch.empty_like(p)
        with torch.no_grad():
            found = statistics.compute(groups, torch.ones((), device="cuda"))
            if need in OF_STEP:
                squares = statistics.changed_squares([p.grad for p in parameters])
                found = statistics.after(found, squares, groups, [0.1])
            result = getattr(found, need)
        tensors = [g for g in result.tensors if g is not None] if need == "gradients" else [result]
        assert all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.parametrize("apply", ["auto", "gradient", "update"])
def test_a_whole_step_of_momentum_reads_the_factors_alone_from_the_device(imagined_accelerator, apply, monkeypatch):
    reads: list[int] = []
    monkeypatch.setattr(Factors, "read", lambda self: reads.append(1) or [1.5] * 2)
    model = nn.Sequential(OnDevice(4, 3), OnDevice(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerAdaptive(), model, apply=apply)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert len(reads) == 2
    assert list(adapter.get_last_factors().values()) == [1.5, 1.5]


@given(SHAPES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]))
@settings(deadline=None, max_examples=30)
def test_the_numbers_are_those_of_the_tensors(shapes, dtype):
    layers, groups = layers_with_gradients(shapes, dtype)
    kept = groups[0]["params"][::2]
    groups = [{"params": kept, "lr": 0.1, "weight_decay": 0.01}, {"params": groups[0]["params"][1::2], "lr": 0.3}]
    for missing in (None, groups[0]["params"][0]):
        for p in kept:
            p.grad = None if p is missing else p.grad
        for grad_scale in (None, torch.tensor(1024.0)):
            with torch.no_grad():
                tensors = LayerStatistics(layers, AS_NUMBERS).compute(groups, grad_scale)
            numbers = LayerStatistics(layers, AS_NUMBERS).numbers(groups, grad_scale)
            assert set(numbers) == AS_NUMBERS
            for name, values in numbers.items():
                assert values == pytest.approx(getattr(tensors, name).tolist(), rel=1e-14, abs=1e-300), name


def test_a_norm_that_is_left_out_may_be_broken():
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.full((2,), math.inf))
    layers = [Layer("", (weight, bias))]
    groups = [{"params": [weight], "lr": 1.0, "weight_decay": 0.5}, {"params": [bias], "lr": 1.0, "weight_decay": 0.0}]
    statistics = LayerStatistics(layers, ["matrix_norm", "decay_norm", "weight_norm"])
    expected = {"matrix_norm": [2.0], "decay_norm": [1.0], "weight_norm": [math.inf]}
    assert statistics.numbers(groups) == expected
    computed = statistics.compute(groups)
    assert {name: getattr(computed, name).tolist() for name in expected} == expected


def test_squares_of_tensors_make_the_norms_of_layers(make_model, backward):
    model = make_model()
    backward(model)
    model[2].bias.grad = None
    layers = make_layers(dict(model.named_parameters()), "module")
    statistics = LayerStatistics(layers, ("gradient_norm", "weight_norm"))
    found = statistics.compute([{"params": list(model.parameters())}])
    gradients = statistics.squares([p.grad for p in statistics.members])
    weights = statistics.squares(statistics.members)
    torch.testing.assert_close(
        statistics.norms([gradients, weights]),
        torch.stack([found.gradient_norm, found.weight_norm]),
        rtol=1e-14,
        atol=0,
    )


def test_squares_of_nothing_are_zero(make_model):
    model = make_model()
    statistics = LayerStatistics(make_layers(dict(model.named_parameters()), "module"), ())
    squares = statistics.squares([None] * len(statistics.members))
    assert statistics.norms([squares]).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_step_that_a_gradient_scaler_skips_does_not_count_though_clipping_made_its_gradients_finite(found_inf):
    layers, groups = layers_with_gradients([[(2,)], [(3, 2)]])
    with torch.no_grad():
        found = LayerStatistics(layers, ("counts",)).compute(groups, found_inf=torch.tensor(found_inf))
    assert found.counts.item() is (found_inf == 0)
