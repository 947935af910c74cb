# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution and its backward, step by step, on any device and in any floating-point type.

Types narrower than float32 are computed in float32, and the results are rounded.

Shapes: B images; C_in = G * C channels in G offset groups; K = kh * kw taps; P = H_out * W_out
output positions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdcn.reference.geometry import IntPair, output_shape, pair


class Cell(NamedTuple):
    """The four corners around each sample: see Note [Bilinear sampling] in csrc/core/bilinear.h."""

    pixels: Tensor  # [4, B, G, K, P], y * W + x of each corner; an arbitrary valid index if outside
    inside: Tensor  # [4, B, G, K, P], whether the corner is a pixel of the image
    fy: Tensor  # [B, G, K, P], in [0, 1), or NaN
    fx: Tensor  # [B, G, K, P]


def deform_conv2d(
    input: Tensor,  # [B, C_in, H, W]
    offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    mask: Tensor | None = None,  # [B, G*K, H_out, W_out]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Define `mmdcn.ops.deform_conv2d`: sample, scale by the mask, and multiply by the weight."""
    dtype = input.dtype
    input, offset, weight, bias, mask = widen(input, offset, weight, bias, mask)
    cell = locate(offset, input.shape, weight.shape, stride, padding, dilation)
    samples = interpolate(corner_values(input, cell), cell)  # [B, G, C, K, P]
    columns = _group_columns(_scale(samples, mask), weight)  # [B, groups, C_in/groups, K, P]
    output = torch.einsum('bgckp,gock->bgop', columns, _group_weight(weight, input))
    output = output.reshape(len(input), len(weight), *offset.shape[2:])
    return (output if bias is None else output + bias[:, None, None]).to(dtype)


def deform_conv2d_backward(
    grad_output: Tensor,  # [B, C_out, H_out, W_out]
    input: Tensor,  # [B, C_in, H, W]
    offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    mask: Tensor | None,  # [B, G*K, H_out, W_out]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of input, offset, mask and weight, by the chain rule instead of autograd."""
    types = [None if tensor is None else tensor.dtype for tensor in (input, offset, mask, weight)]
    grad_output, input, offset, mask, weight = widen(grad_output, input, offset, mask, weight)
    cell = locate(offset, input.shape, weight.shape, stride, padding, dilation)
    corners = corner_values(input, cell)  # [4, B, G, C, K, P]
    samples = interpolate(corners, cell)  # [B, G, C, K, P]
    group_weight = _group_weight(weight, input)  # [groups, C_out/groups, C_in/groups, K]
    group_grad = grad_output.flatten(2).unflatten(1, (len(group_weight), -1))  # [B, groups, C_out/groups, P]

    columns = _group_columns(_scale(samples, mask), weight)
    grad_weight = torch.einsum('bgop,bgckp->gock', group_grad, columns).reshape(weight.shape)

    # The columns' gradient is the transposed weight times the output's gradient.
    grad_columns = torch.einsum('gock,bgop->bgckp', group_weight, group_grad).reshape(samples.shape)
    grad_mask = None if mask is None else (grad_columns * samples).sum(2).reshape(mask.shape)
    grad_samples = _scale(grad_columns, mask)

    # The derivative of a sample by its coordinates, summed over the channels that share them.
    slope_y, slope_x = slopes(corners, cell)
    grad_places = torch.stack([(grad_samples * slope_y).sum(2), (grad_samples * slope_x).sum(2)], dim=3)
    grad_offset = grad_places.reshape(offset.shape)  # [B, G, K, 2, P] -> [B, 2*G*K, H_out, W_out]

    # Each corner gets the sample's gradient times its bilinear weight.
    grad_input = torch.zeros_like(_group_planes(input, samples.shape[1]))  # [B, G, C, H*W]
    for share, pixels, inside in zip(corner_weights(cell), cell.pixels, cell.inside, strict=True):
        share_of_grad = torch.where(inside.unsqueeze(2), grad_samples * share.unsqueeze(2), 0)
        index = pixels.unsqueeze(2).expand_as(share_of_grad)
        grad_input = grad_input.scatter_add(3, index.flatten(3), share_of_grad.flatten(3))
    gradients = (grad_input.reshape(input.shape), grad_offset, grad_mask, grad_weight)
    rounded: Any = (None if grad is None else grad.to(dtype) for grad, dtype in zip(gradients, types, strict=True))
    return tuple(rounded)


def widen(*tensors: Tensor | None) -> list[Any]:
    """Convert the tensors to float32, or leave them in float64."""
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def locate(
    offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    input_size: torch.Size,  # B, C_in, H, W
    weight_size: torch.Size,  # C_out, C_in/groups, kh, kw
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
) -> Cell:
    """Find the cell in which each tap of each output position samples."""
    height, width = input_size[2:]
    out_size = output_shape((height, width), weight_size[2:], stride, padding, dilation)
    regular_y, regular_x = regular_places(weight_size[2:], out_size, stride, padding, dilation, offset)
    places = offset.flatten(2).unflatten(1, (-1, len(regular_y), 2))  # [B, G, K, 2, P]
    y, x = regular_y + places[:, :, :, 0], regular_x + places[:, :, :, 1]

    sampled = (y > -1) & (y < height) & (x > -1) & (x < width)
    nan = torch.isnan(y) | torch.isnan(x)
    top, left = (torch.where(sampled, place, -2).detach().floor().long() for place in (y, x))
    fy, fx = (
        torch.where(sampled, place - corner, torch.where(nan, torch.nan, 0.0))
        for place, corner in ((y, top), (x, left))
    )
    corner_y = torch.stack([top, top, top + 1, top + 1])
    corner_x = torch.stack([left, left + 1, left, left + 1])
    inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
    return Cell(torch.where(inside, corner_y * width + corner_x, 0), inside, fy, fx)


def regular_places(
    kernel: torch.Size,
    out_size: tuple[int, int],
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    like: Tensor,
) -> tuple[Tensor, Tensor]:  # y and x, each [K, P]
    """Return the coordinates at which the taps sample without offsets."""

    def axis(i: int) -> Tensor:  # [kernel, out]
        taps = torch.arange(kernel[i], device=like.device) * pair(dilation)[i]
        positions = torch.arange(out_size[i], device=like.device) * pair(stride)[i] - pair(padding)[i]
        return (taps[:, None] + positions).to(like.dtype)

    rows, columns = axis(0), axis(1)
    full = (kernel[0], kernel[1], out_size[0], out_size[1])
    y = rows[:, None, :, None].expand(full)
    x = columns[None, :, None, :].expand(full)
    return y.flatten(2).flatten(0, 1), x.flatten(2).flatten(0, 1)


def corner_values(input: Tensor, cell: Cell) -> Tensor:  # [4, B, G, C, K, P]
    """Read the four corners of each sample; a corner outside the image is zero."""
    _, offset_groups, taps, positions = cell.fy.shape
    planes = _group_planes(input, offset_groups)
    size = (*planes.shape[:3], taps * positions)

    def read(pixels: Tensor, inside: Tensor) -> Tensor:
        values = planes.gather(3, pixels.flatten(2).unsqueeze(2).expand(size))
        return torch.where(inside.unsqueeze(2), values.reshape(*size[:3], taps, positions), 0)

    return torch.stack([read(*corner) for corner in zip(cell.pixels, cell.inside, strict=True)])


def corner_weights(cell: Cell) -> Tensor:  # [4, B, G, K, P]
    """Return the bilinear weight of each corner."""
    fy, fx = cell.fy, cell.fx
    return torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx])


def interpolate(corners: Tensor, cell: Cell) -> Tensor:  # [B, G, C, K, P]
    """Interpolate between the four corners."""
    return (corner_weights(cell).unsqueeze(3) * corners).sum(0)


def slopes(corners: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:  # each [B, G, C, K, P]
    """Return the derivatives of each sample with respect to its y and its x."""
    v0, v1, v2, v3 = corners
    fy, fx = cell.fy.unsqueeze(2), cell.fx.unsqueeze(2)
    return (1 - fx) * (v2 - v0) + fx * (v3 - v1), (1 - fy) * (v1 - v0) + fy * (v3 - v2)


def _scale(samples: Tensor, mask: Tensor | None) -> Tensor:  # [B, G, C, K, P]
    if mask is None:
        return samples
    batch, offset_groups, _, taps, positions = samples.shape
    return samples * mask.reshape(batch, offset_groups, 1, taps, positions)


def _group_planes(input: Tensor, offset_groups: int) -> Tensor:  # [B, G, C, H*W]
    return input.flatten(2).unflatten(1, (offset_groups, -1))


def _group_columns(samples: Tensor, weight: Tensor) -> Tensor:  # [B, groups, C_in/groups, K, P]
    return samples.flatten(1, 2).unflatten(1, (-1, weight.shape[1]))


def _group_weight(weight: Tensor, input: Tensor) -> Tensor:  # [groups, C_out/groups, C_in/groups, K]
    groups = input.shape[1] // weight.shape[1]
    return weight.reshape(groups, -1, weight.shape[1], weight.shape[2] * weight.shape[3])
