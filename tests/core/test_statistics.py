"""The statistics that a rule gets, and the error when it reads others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.layers import Layer
from layerwise.statistics import NEEDS, OF_STEP, LayerStatistics, check_needs


def test_only_what_is_needed_is_computed_and_reading_the_rest_names_the_remedy():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    layers, groups = [Layer("", (parameter,))], [{"params": [parameter], "lr": 0.1}]
    for need in NEEDS:
        measured = LayerStatistics(layers, [need])
        statistics = measured.compute(groups)
        if need in OF_STEP:  # known after the step
            assert not any(hasattr(statistics, name) for name in NEEDS)
            statistics = measured.after(statistics, measured.squares([torch.ones(2)]), groups, [0.1])
        assert [name for name in NEEDS if hasattr(statistics, name)] == [need]
    with pytest.raises(AttributeError, match=r"statistics\.weight_norm .*; add 'weight_norm' to them"):
        _ = LayerStatistics(layers, ["gradient_norm"]).compute(groups).weight_norm
    with pytest.raises(AttributeError, match="there is no statistic 'gradient_size'; there are gradient_norm, weight"):
        _ = LayerStatistics(layers, ["gradient_norm"]).compute(groups).gradient_size


def test_an_unknown_need_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="needs holds 'hessian'; allowed: 'gradient_norm'"):
        check_needs(["gradient_norm", "hessian"])
    with pytest.raises(TypeError, match=r"needs='gradient_norm' is one string; write needs = \('gradient_norm',\)"):
        check_needs("gradient_norm")


def test_needs_that_are_no_collection_are_refused():
    with pytest.raises(TypeError, match=r"needs=3 must be a tuple of names, such as \('gradient_norm',\)"):
        check_needs(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_device", [False, True], ids=["rates as numbers", "rates as tensors"])
def test_directions_of_layers_are_those_of_numpy(dtype, on_device):
    """Two layers, of which one has a parameter in each group, one parameter without a gradient, and a rate of zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 7), (5,), (9, 9), (2,), (3,)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    changes = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes[:3]] + [
        None,
        torch.ones(3).to(dtype),
    ]
    layers = [Layer("a", tuple(weights[:2])), Layer("b", tuple(weights[2:4])), Layer("still", (weights[4],))]
    rates = [0.5, 0.03, 0.0]
    shown = [torch.tensor(rate, dtype=torch.float64) for rate in rates] if on_device else rates
    members = [[weights[0], weights[2]], [weights[1], weights[3]], [weights[4]]]
    groups = [{"params": held, "lr": rate} for held, rate in zip(members, shown, strict=True)]
    statistics = LayerStatistics(layers, ["direction_norm", "direction_rms", "weight_norm"])
    found = statistics.after(statistics.compute(groups), statistics.squares(changes), groups, shown)
    first, second, third = (c.double().numpy().ravel() for c in changes[:3])
    expected = [np.sqrt((first**2).sum() / 0.5**2 + (second**2).sum() / 0.03**2), np.sqrt((third**2).sum()) / 0.5, 0.0]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    np.testing.assert_allclose(found.direction_norm.numpy(), expected, rtol=tolerance)
    sizes = np.array([2105, 83, 3])
    np.testing.assert_allclose(found.direction_rms.numpy(), expected / np.sqrt(sizes), rtol=tolerance)
    assert torch.isfinite(found.weight_norm).all()
