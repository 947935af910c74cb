# SPDX-License-Identifier: Apache-2.0
"""Where layers look."""

import pytest
import torch
from torch import nn

from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdcn.visualization import SamplingRecorder


def network() -> nn.Sequential:
    """Two layers at strides 2 and 4: position i of the last one lies on pixel 4 * i."""
    return nn.Sequential(
        ModulatedDeformConv2dPack(3, 2, 3, stride=2, padding=1), DeformConv2dPack(2, 2, 3, stride=2, padding=1)
    )


def test_a_new_layer_looks_at_the_regular_grid_around_a_place() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('1', y=13.0, x=8.0, depth=1)
    # The nearest position to (13, 8) is (3, 2), on pixel (12, 8); its taps step over the pixels of the layer before.
    expected = [[y, x] for y in (10, 12, 14) for x in (6, 8, 10)]
    assert places.tolist() == expected
    assert weights.tolist() == [1.0] * 9


def test_offsets_move_the_places_and_masks_weigh_them() -> None:
    model = network()
    with torch.no_grad():
        model[0].conv_offset.bias[2 * 4 : 2 * 4 + 2] = torch.tensor([0.5, -2.0])  # the middle tap, (y, x)
        model[0].conv_offset.bias[18 + 4] = 100.0  # its mask: sigmoid gives 1
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('0', y=12.0, x=8.0, depth=1)
    assert places[4].tolist() == [12.5, 6.0]
    assert weights.tolist() == pytest.approx([0.5] * 4 + [1.0] + [0.5] * 4)


def test_the_taps_are_followed_through_the_layers_before() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('1', y=12.0, x=8.0, depth=2)
    assert places.shape == (81, 2)
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(9, 16) for x in range(5, 12)}
    assert weights.tolist() == [0.5] * 81  # the new DCNv2's masks


def test_nothing_stays_attached_to_the_model() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        pass
    model(torch.zeros(1, 3, 32, 24))
    assert recorder.layers == []
