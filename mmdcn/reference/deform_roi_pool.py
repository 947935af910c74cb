# SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling and its backward, region by region, on any device and in any floating-point type.

Types narrower than float32 are computed in float32, and the results are rounded.

Shapes: B images; N regions; ph x pw bins. A bin is the mean over a grid of gy x gx bilinear samples. A sample is the
sum over all pixels of the pixel times a factor of its row and a factor of its column. The mean has the same form.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmdcn.reference.deform_conv2d import widen
from mmdcn.reference.geometry import IntPair, pair


class Factors(NamedTuple):
    """The share of each pixel of an axis in each bin, and the derivative of the share by the bin's offset."""

    share: Tensor  # [ph, pw, size]
    slope: Tensor  # [ph, pw, size]


def deform_roi_pool(
    input: Tensor,  # [B, C, H, W]
    rois: Tensor,  # [N, 5]
    offset: Tensor | None,  # [N, 2, ph, pw]
    output_size: IntPair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:  # [N, C, ph, pw]
    """Define `mmdcn.ops.deform_roi_pool`: the mean of the samples of each bin."""
    dtype, size = input.dtype, pair(output_size)
    input, rois, offset = widen(input, rois.detach(), offset)
    none = input.flatten()[:0].reshape(0, input.shape[1], *size)  # keeps the autograd history of the input
    outputs = [none if offset is None else none + offset[:0, :1]]
    for roi, moves in _regions(rois, offset, size):
        rows, columns = _factors(roi, moves, input, spatial_scale, sampling_ratio, gamma, aligned)
        image = input[int(roi[0])]
        outputs.append(torch.einsum('chw,pqh,pqw->cpq', image, rows.share, columns.share)[None])
    return torch.cat(outputs).to(dtype)


def deform_roi_pool_backward(
    grad_output: Tensor,  # [N, C, ph, pw]
    input: Tensor,  # [B, C, H, W]
    rois: Tensor,  # [N, 5]
    offset: Tensor | None,  # [N, 2, ph, pw]
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    aligned: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of input and offset, by the chain rule instead of autograd."""
    types = input.dtype, None if offset is None else offset.dtype
    grad_output, input, rois, offset = widen(grad_output, input, rois.detach(), offset)
    size = (grad_output.shape[2], grad_output.shape[3])
    grad_images = list(torch.zeros_like(input))
    grad_moves = [input.new_zeros(0, 2, *size)]
    for grad, (roi, moves) in zip(grad_output, _regions(rois, offset, size), strict=True):
        rows, columns = _factors(roi, moves, input, spatial_scale, sampling_ratio, gamma, aligned)
        index = int(roi[0])
        # Each pixel gets its share in a bin times the bin's gradient.
        given = torch.einsum('cpq,pqh,pqw->chw', grad, rows.share, columns.share)
        grad_images[index] = grad_images[index] + given
        by_y = torch.einsum('cpq,chw,pqh,pqw->pq', grad, input[index], rows.slope, columns.share)
        by_x = torch.einsum('cpq,chw,pqh,pqw->pq', grad, input[index], rows.share, columns.slope)
        grad_moves.append(torch.stack([by_x, by_y])[None])
    grad_input = torch.stack(grad_images) if grad_images else torch.zeros_like(input)
    return grad_input.to(types[0]), None if offset is None else torch.cat(grad_moves).to(types[1])


def _regions(rois: Tensor, offset: Tensor | None, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    offsets = rois.new_zeros(len(rois), 2, *size) if offset is None else offset
    return list(zip(rois, offsets, strict=True))


def _factors(
    roi: Tensor,  # [5], image, x1, y1, x2, y2
    moves: Tensor,  # [2, ph, pw], x and y
    input: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    aligned: bool,
) -> tuple[Factors, Factors]:
    """Return the factors of the rows and those of the columns."""

    def axis(dim: int, bins: int, number: Tensor, pixels: int) -> Factors:  # dim 0: x, 1: y
        start = roi[1 + dim] * spatial_scale - 0.5 * aligned  # the centre of the first pixel is coordinate 0
        length = (roi[3 + dim] - roi[1 + dim]) * spatial_scale
        if not aligned:
            length = length.clamp(min=1)
        count = sampling_ratio or _count(length / bins)
        grid = (torch.arange(count).to(roi) + 0.5) / max(count, 1) * (length / bins)
        places = (start + gamma * length * moves[dim] + number * (length / bins)).unsqueeze(2) + grid
        share, slope = _bilinear(places, pixels)
        return Factors(share.sum(2) / max(count, 1), gamma * length * slope.sum(2) / max(count, 1))

    bin_y = torch.arange(moves.shape[1]).to(roi)[:, None]
    bin_x = torch.arange(moves.shape[2]).to(roi)
    return axis(1, moves.shape[1], bin_y, input.shape[2]), axis(0, moves.shape[2], bin_x, input.shape[3])


def _count(bin_length: Tensor) -> int:
    """Return the number of samples along an axis of a bin: one per pixel, rounded up."""
    length = bin_length.item()
    return max(math.ceil(length), 0) if math.isfinite(length) else 1


def _bilinear(places: Tensor, pixels: int) -> tuple[Tensor, Tensor]:  # each [ph, pw, g, pixels]
    """Return each pixel's share in each sample along an axis, and the share's slope, by RoIAlign's border rule."""
    inside = (places >= -1) & (places <= pixels)
    place = places.clamp(0, pixels - 1)
    low = torch.where(inside, place, 0).floor()
    fraction = place - low
    numbers = torch.arange(pixels, device=places.device)
    is_low = (low.unsqueeze(3) == numbers).to(places.dtype)
    is_high = ((low + 1).clamp(max=pixels - 1).unsqueeze(3) == numbers).to(places.dtype)
    kept = torch.where(places.isnan(), torch.nan, inside.to(places.dtype)).unsqueeze(3)
    share = kept * ((1 - fraction.unsqueeze(3)) * is_low + fraction.unsqueeze(3) * is_high)
    slope = kept * torch.where((places >= 0).unsqueeze(3), is_high - is_low, 0)
    return share, slope
