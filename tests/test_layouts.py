# SPDX-License-Identifier: Apache-2.0
"""The orders of offset channels, each against its definition written out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mmdcn import layouts

GROUPS, HEIGHT, WIDTH = 2, 3, 2
TAPS = HEIGHT * WIDTH
PLANES = GROUPS * TAPS
Y, X = 0, 1

# Where a layout puts the offset along `axis` of tap (row, column) in offset group g, and that tap's mask.
OFFSET: dict[str, Callable[[int, int, int, int], int]] = {
    'mmcv': lambda g, row, column, axis: (g * TAPS + row * WIDTH + column) * 2 + axis,
    '4uiiurz1': lambda g, row, column, axis: axis * PLANES + g * TAPS + row * WIDTH + column,
    'mindspore': lambda g, row, column, axis: (axis == Y) * PLANES + g * TAPS + row * WIDTH + column,
    'dcnv3': lambda g, row, column, axis: (g * TAPS + column * HEIGHT + row) * 2 + (axis == Y),
}
MASK: dict[str, Callable[[int, int, int], int]] = {
    **dict.fromkeys(OFFSET, lambda g, row, column: 2 * PLANES + g * TAPS + row * WIDTH + column),
    'dcnv3': lambda g, row, column: 2 * PLANES + g * TAPS + column * HEIGHT + row,
}
PLACES = [(g, row, column) for g in range(GROUPS) for row in range(HEIGHT) for column in range(WIDTH)]


def test_every_layout_is_tested() -> None:
    assert set(layouts.LAYOUTS) == set(OFFSET)


@pytest.mark.parametrize('layout', OFFSET)
@pytest.mark.parametrize('masks', [False, True], ids=['offsets', 'offsets and masks'])
def test_each_offset_and_mask_arrives_at_its_canonical_channel(layout: str, masks: bool) -> None:
    theirs = torch.randn(2, (3 if masks else 2) * PLANES, 4, 5)
    ours = layouts.to_canonical(theirs, layout, (HEIGHT, WIDTH), GROUPS)
    assert ours.shape == theirs.shape
    for place in PLACES:
        for axis in (Y, X):
            assert torch.equal(ours[:, OFFSET['mmcv'](*place, axis)], theirs[:, OFFSET[layout](*place, axis)])
        if masks:
            assert torch.equal(ours[:, MASK['mmcv'](*place)], theirs[:, MASK[layout](*place)])


@pytest.mark.parametrize('layout', OFFSET)
@pytest.mark.parametrize('parts', [2, 3])
def test_there_and_back_gives_the_same_bits(layout: str, parts: int) -> None:
    offset = torch.randn(2, 4, 5, parts * PLANES)  # NHWC
    for first, second in (
        (layouts.to_canonical, layouts.from_canonical),
        (layouts.from_canonical, layouts.to_canonical),
    ):
        there = first(offset, layout, (HEIGHT, WIDTH), GROUPS, dim=-1)
        assert torch.equal(second(there, layout, (HEIGHT, WIDTH), GROUPS, dim=-1), offset)
        assert torch.equal(there, offset) == (layout == 'mmcv')


@pytest.mark.parametrize('layout', OFFSET)
def test_converted_weights_predict_converted_offsets(layout: str) -> None:
    x, weight, bias = torch.randn(1, 3, 6, 5), torch.randn(2 * PLANES, 3, 3, 3), torch.randn(2 * PLANES)
    converted = (layouts.to_canonical(tensor, layout, (HEIGHT, WIDTH), GROUPS, dim=0) for tensor in (weight, bias))
    expected = layouts.to_canonical(F.conv2d(x, weight, bias), layout, (HEIGHT, WIDTH), GROUPS)
    # Each channel is the same sum of 27 products in either, perhaps in another order.
    torch.testing.assert_close(F.conv2d(x, *converted), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('convert', [layouts.to_canonical, layouts.from_canonical])
def test_a_mistake_is_named(convert: Callable) -> None:
    with pytest.raises(ValueError, match="layout must be one of mmcv, 4uiiurz1, mindspore, dcnv3, got 'xy'"):
        convert(torch.zeros(1, 18, 2, 2), 'xy', (3, 3))
    with pytest.raises(
        ValueError, match=r'3x3 taps in 2 offset groups have 36 .* 54 with masks; dimension 1 .* has 18'
    ):
        convert(torch.zeros(1, 18, 2, 2), 'dcnv3', (3, 3), 2)
