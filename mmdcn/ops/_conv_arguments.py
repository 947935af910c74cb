# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of a deformable convolution."""

from collections.abc import Sequence

from torch import Tensor

from mmdcn.ops._arguments import Pair, check, check_floating, check_like, check_shape, pair, single_if_low


def weight_groups(input: Tensor, offset: Tensor, weight: Tensor) -> tuple[int, int]:
    """Return the numbers of weight groups and offset groups; they are meaningful only if the shapes fit."""
    _, group_channels, kernel_height, kernel_width = weight.shape
    return input.shape[1] // group_channels, offset.shape[1] // (2 * kernel_height * kernel_width)


def conv_geometry(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> tuple[Pair, Pair, Pair]:
    """Return stride, padding and dilation as (y, x) each."""
    return pair(stride, 'stride', 1), pair(padding, 'padding', 0), pair(dilation, 'dilation', 1)


def check_arguments(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> tuple[int, int]:
    """Check every argument, and return the numbers of weight groups and offset groups."""
    check_floating(input, 'input', 4, '[B, C_in, H, W]')
    check_floating(weight, 'weight', 4, '[C_out, C_in/groups, kh, kw]')
    check_floating(offset, 'offset', 4, '[B, 2*G*K, H_out, W_out]')
    groups, offset_groups = _check_groups(input, offset, weight)
    height, width = input.shape[2:]
    kernel_height, kernel_width = weight.shape[2:]
    out_size = output_size(input, weight, stride, padding, dilation)
    check(
        out_size[0] > 0 and out_size[1] > 0,
        lambda: (
            f'input must be large enough for a {kernel_height} x {kernel_width} kernel with padding {padding} and '
            f'dilation {dilation}; the output would be empty, got {height} x {width} pixels'
        ),
    )
    samples = offset_groups * kernel_height * kernel_width
    check_shape(offset, 'offset', '[B, 2*G*K, H_out, W_out]', input.shape[0], 2 * samples, *out_size)
    check_like(weight, 'weight', input, input.dtype)
    check_like(offset, 'offset', input, input.dtype, *single_if_low(input))
    if mask is not None:
        check_floating(mask, 'mask', 4, '[B, G*K, H_out, W_out]')
        check_shape(mask, 'mask', '[B, G*K, H_out, W_out]', input.shape[0], samples, *out_size)
        check_like(mask, 'mask', input, offset.dtype)
    if bias is not None:
        check_floating(bias, 'bias', 1, '[C_out]')
        check_shape(bias, 'bias', '[C_out]', weight.shape[0])
        check_like(bias, 'bias', input, input.dtype)
    return groups, offset_groups


def _check_groups(input: Tensor, offset: Tensor, weight: Tensor) -> tuple[int, int]:
    """Check that the groups divide the channels, and return the numbers of weight groups and offset groups."""
    _, channels, height, width = input.shape
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    check(
        channels * height * width > 0,
        lambda: f'input must have channels and pixels, got shape {list(input.shape)}',
    )
    check(weight.numel() > 0, lambda: f'weight must have no empty dimension, got shape {list(weight.shape)}')
    check(
        channels % group_channels == 0,
        lambda: (
            f'weight must have a C_in/groups that divides the {channels} channels of input, '
            f'got C_in/groups = {group_channels}'
        ),
    )
    groups = channels // group_channels
    check(
        out_channels % groups == 0,
        lambda: f'weight must have a C_out that its {groups} groups divide, got C_out = {out_channels}',
    )
    taps = kernel_height * kernel_width
    check(
        offset.shape[1] > 0 and offset.shape[1] % (2 * taps) == 0,
        lambda: (
            f'offset must have a positive multiple of 2*K = {2 * taps} channels, y and x of each tap, '
            f'got {offset.shape[1]} channels'
        ),
    )
    offset_groups = offset.shape[1] // (2 * taps)
    check(
        channels % offset_groups == 0,
        lambda: (
            f'offset must have a number of offset groups that divides the {channels} channels of input, '
            f'got {offset.shape[1]} channels, {offset_groups} offset groups'
        ),
    )
    return groups, offset_groups


def output_size(input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    def size(axis: int) -> int:
        span = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        return (input.shape[axis + 2] + 2 * padding[axis] - span) // stride[axis] + 1

    return size(0), size(1)
