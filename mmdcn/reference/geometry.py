# SPDX-License-Identifier: Apache-2.0
"""Sizes, positions and groups that the functions of the convolution family share."""

from collections.abc import Iterable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]  # (y, x)
IntPair = int | Pair


def pair(value: IntPair) -> Pair:
    """Return (y, x); a single number applies to both axes."""
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, value)


def pad(
    input: Tensor,  # [..., H, W]
    padding: IntPair,
) -> Tensor:  # [..., H + 2 * padding, W + 2 * padding]
    """Put `padding` zeros on every side."""
    pad_y, pad_x = pair(padding)
    return F.pad(input, (pad_x, pad_x, pad_y, pad_y))


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Count the positions of a kernel along one axis of an input."""
    padded, span = size + 2 * padding, dilation * (kernel - 1) + 1
    if span > padded:
        raise ValueError(f'the kernel spans {span} pixels, but the padded input has only {padded}')
    return (padded - span) // stride + 1


def transposed_output_size(
    size: int, kernel: int, stride: int, padding: int, output_padding: int, dilation: int
) -> int:
    """Invert output_size; output_padding chooses among the sizes that a stride maps to the same output size."""
    return (size - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding + output_padding


def output_shape(
    input_size: Iterable[int],  # (H, W)
    kernel: Iterable[int],
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
) -> Pair:
    """Apply output_size to both axes."""
    axes = zip(input_size, kernel, pair(stride), pair(padding), pair(dilation), strict=True)
    height, width = (output_size(*axis) for axis in axes)
    return height, width


def transposed_output_shape(
    input_size: Iterable[int],  # (H, W)
    kernel: Iterable[int],
    stride: IntPair,
    padding: IntPair,
    output_padding: IntPair,
    dilation: IntPair,
) -> Pair:
    """Apply transposed_output_size to both axes."""
    settings = map(pair, (stride, padding, output_padding, dilation))
    axes = zip(input_size, kernel, *settings, strict=True)
    height, width = (transposed_output_size(*axis) for axis in axes)
    return height, width


def lattice(index: Pair, scale: IntPair, step: IntPair, count: Iterable[int]) -> tuple[slice, slice]:
    """Slice the pixels index * scale + n * step for n = 0 ... count - 1, along both axes."""
    axes = zip(index, pair(scale), pair(step), count, strict=True)
    rows, columns = (slice(i * s, i * s + d * (n - 1) + 1, d) for i, s, d, n in axes)
    return rows, columns


def positions(size: Iterable[int]) -> Iterable[Pair]:
    """Iterate over all (y, x) of a plane or a kernel, row by row."""
    height, width = size
    return product(range(height), range(width))


def split_groups(
    tensor: Tensor,  # [..., C, ...], C at dim
    dim: int,
    groups: int,
) -> Tensor:  # [..., groups, C / groups, ...]
    """Split a dimension into groups, which get a dimension of their own."""
    return torch.unflatten(tensor, dim, (groups, -1))


def add_bias(
    output: Tensor,  # [B, C_out, H_out, W_out]
    bias: Tensor | None,  # [C_out]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Add one number to each plane, if there is a bias."""
    return output if bias is None else output + bias[:, None, None]
