"""The weights that stand for a layer."""

from __future__ import annotations

import pytest
import torch

from layerwise.rules.directionality import samples_of


def test_sampled_weights_lie_on_all_positions_of_a_kernel():
    parameter = torch.zeros(128, 128, 3, 3)
    (sample,) = samples_of([parameter], 4096)
    assert sample is not None
    numbers = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
    taken = sample.of(numbers, parameter).long()
    assert len(taken.unique()) == 4096
    counts = torch.bincount(taken % 9)
    assert counts.min() > 0.9 * 4096 / 9
    assert taken.max() > 0.9 * parameter.numel()


@pytest.mark.parametrize("most", [None, 6])
def test_a_layer_of_no_more_weights_than_that_is_taken_whole(most):
    assert samples_of([torch.zeros(2, 2), torch.zeros(1, dtype=torch.complex64)], most) == [None, None]


def test_the_weights_of_a_layer_share_the_sample_by_their_numbers_and_each_has_one():
    samples = samples_of([torch.zeros(100), torch.zeros(300), torch.zeros(1)], 40)
    assert [sample and sample.count for sample in samples] == [10, 30, 1]
