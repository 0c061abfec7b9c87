"""The statistics that a rule gets, and the error when it reads others."""

from __future__ import annotations

import pytest
import torch

from layerwise.layers import Layer
from layerwise.statistics import NEEDS, LayerStatistics, check_needs


def test_only_what_is_needed_is_computed_and_reading_the_rest_names_the_remedy():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    layers, groups = [Layer("", (parameter,))], [{"params": [parameter], "lr": 0.1}]
    for need in NEEDS:
        statistics = LayerStatistics(layers, [need]).compute(groups)
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
