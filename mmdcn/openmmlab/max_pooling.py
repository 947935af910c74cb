# SPDX-License-Identifier: Apache-2.0
"""Maximum pooling of regions: RoIPool, and RoIAlign in its `max` mode.

This is plain torch and runs on any device. Regions of similar size are processed together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLES = 1 << 22  # the number of samples that are gathered at a time


class Samples(NamedTuple):
    """The sampling coordinates along an axis: first + i * step, for i from 0 to samples - 1."""

    first: Tensor  # [N, bins]
    step: Tensor  # [N, bins]
    samples: Tensor  # [N, bins]

    def of(self, regions: Tensor) -> 'Samples':
        """Select some regions."""
        return Samples(*(each[regions] for each in self))

    def places(self) -> Tensor:  # [N, bins, samples]
        """Return the coordinates; a bin with fewer samples repeats its last one, and one without samples has NaN."""
        most = max(int(self.samples.max()), 1)
        number = torch.arange(most, device=self.first.device).minimum(self.samples[:, :, None] - 1)
        places = self.first[:, :, None] + number * self.step[:, :, None]
        return places.masked_fill(number < 0, torch.nan)


def roi_align_samples(
    rois: Tensor,  # [N, 5]
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Samples, Samples]:
    """Return the y and x coordinates of RoIAlign's samples."""

    def axis(low: Tensor, high: Tensor, bins: int) -> Samples:
        start, end = (corner * spatial_scale - (0.5 if aligned else 0.0) for corner in (low, high))
        length = end - start if aligned else (end - start).clamp(min=1)
        bin_length = (length / bins)[:, None]
        count = torch.full_like(bin_length, sampling_ratio) if sampling_ratio else bin_length.ceil()
        step = bin_length / count
        first = start[:, None] + torch.arange(bins, device=rois.device) * bin_length + step / 2
        return Samples(first, step.expand_as(first), count.clamp(min=0).to(torch.int64).expand_as(first))

    x1, y1, x2, y2 = rois[:, 1:].to(torch.promote_types(rois.dtype, torch.float32)).unbind(1)
    return axis(y1, y2, size[0]), axis(x1, x2, size[1])


def roi_pool_samples(
    rois: Tensor,  # [N, 5]
    size: tuple[int, int],
    spatial_scale: float,
    image_size: tuple[int, ...],
) -> tuple[Samples, Samples]:
    """Return the rows and columns of the pixels of RoIPool's bins (Girshick, Fast R-CNN, ICCV 2015, section 2.1)."""

    def axis(low: Tensor, high: Tensor, bins: int, pixels: int) -> Samples:
        start, end = low * spatial_scale, (high + 1) * spatial_scale
        bin_length = ((end - start) / bins)[:, None]
        number = torch.arange(bins, device=rois.device)
        first = (number * bin_length + start[:, None]).floor().clamp(0, pixels)
        last = ((number + 1) * bin_length + start[:, None]).ceil().clamp(0, pixels)
        count = (last - first).masked_fill(bin_length <= 0, 0)
        return Samples(first, torch.ones_like(first), count.clamp(min=0).to(torch.int64))

    x1, y1, x2, y2 = rois[:, 1:].to(torch.promote_types(rois.dtype, torch.float32)).unbind(1)
    return axis(y1, y2, size[0], image_size[0]), axis(x1, x2, size[1], image_size[1])


def largest(
    input: Tensor,  # [B, C, H, W]
    rois: Tensor,  # [N, 5]
    rows: Samples,
    columns: Samples,
) -> tuple[Tensor, Tensor, Tensor]:  # each [N, C, ph, pw]
    """Return the largest sample of each bin and its y and x: the first of equal samples; -1 for an empty bin."""
    shape = (len(rois), input.shape[1], rows.first.shape[1], columns.first.shape[1])
    values = input.new_zeros(shape)
    at_y, at_x = (rows.first.new_full(shape, -1) for _ in range(2))
    images = rois[:, 0].long()
    for regions in _alike(rows, columns, input.shape[1]):
        y, x = rows.of(regions).places(), columns.of(regions).places()
        samples = _bilinear(input, images[regions], y, x)  # [n, C, ph, gy, pw, gx]
        samples = samples.transpose(3, 4).flatten(4)
        # argmax returns the first of equal samples; max does not guarantee that.
        best = samples.argmax(4, keepdim=True)
        y = y[:, None, :, None].expand(*best.shape[:4], -1).gather(4, best // x.shape[2])[..., 0]
        x = x[:, None, None].expand(*best.shape[:4], -1).gather(4, best % x.shape[2])[..., 0]
        found = ~(y.isnan() | x.isnan())
        values[regions] = samples.gather(4, best)[..., 0].where(found, 0).to(input.dtype)
        at_y[regions], at_x[regions] = y.where(found, -1), x.where(found, -1)
    return values, at_y, at_x


def add_gradient(
    grad_output: Tensor,  # [N, C, ph, pw]
    rois: Tensor,  # [N, 5]
    at_y: Tensor,  # [N, C, ph, pw], as `largest` gives it
    at_x: Tensor,
    grad_input: Tensor,  # [B, C, H, W]
) -> None:
    """Add each bin's gradient to the pixels from which its largest sample is interpolated."""
    _, channels, height, width = grad_input.shape
    images = rois[:, 0].long()[:, None, None, None]
    plane = images * channels + torch.arange(channels, device=rois.device)[:, None, None]
    kept = grad_output.where(at_y != -1, 0)
    summed = torch.zeros(grad_input.numel(), dtype=at_y.dtype, device=rois.device)
    for row, row_share in _neighbours(at_y, height):
        for column, column_share in _neighbours(at_x, width):
            place = (plane * height + row) * width + column
            summed.index_add_(0, place.flatten(), (kept * row_share * column_share).to(summed.dtype).flatten())
    grad_input.add_(summed.view(grad_input.shape))


def _alike(rows: Samples, columns: Samples, channels: int) -> Iterator[Tensor]:
    """Yield groups of regions with similar numbers of samples, at most _SAMPLES per group if it has several regions."""
    if len(rows.samples) == 0:
        return
    sides = (each.samples.amax(1).clamp(min=1) * each.samples.shape[1] for each in (rows, columns))
    height, width = (side.tolist() for side in sides)
    order = sorted(range(len(height)), key=lambda region: height[region] * width[region])
    first, tallest, widest = 0, 0, 0
    for position, region in enumerate(order):
        tallest, widest = max(tallest, height[region]), max(widest, width[region])
        if position > first and (position - first + 1) * channels * tallest * widest > _SAMPLES:
            yield torch.tensor(order[first:position], device=rows.first.device)
            first, tallest, widest = position, height[region], width[region]
    yield torch.tensor(order[first:], device=rows.first.device)


def _bilinear(
    input: Tensor,
    images: Tensor,  # [n]
    y: Tensor,  # [n, ph, gy]
    x: Tensor,  # [n, pw, gx]
) -> Tensor:  # [n, C, ph, gy, pw, gx]
    """Sample images as RoIAlign does."""
    total: Tensor | float = 0.0
    for row, row_share in _neighbours(y, input.shape[2]):
        for column, column_share in _neighbours(x, input.shape[3]):
            at = images[:, None, None, None, None], row[:, :, :, None, None], column[:, None, None]
            pixels = input.movedim(1, -1)[at]  # [n, ph, gy, pw, gx, C]
            total = total + pixels * (row_share[:, :, :, None, None] * column_share[:, None, None])[..., None]
    assert isinstance(total, Tensor)
    return total.movedim(-1, 1)


def _neighbours(places: Tensor, pixels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pixels on both sides of each coordinate, and their weights: zero outside the image, or for NaN."""
    inside = (places >= -1) & (places <= pixels)
    place = places.where(inside, 0).clamp(0, pixels - 1)
    low = place.floor()
    fraction = place - low
    yield low.long(), (1 - fraction).where(inside, 0)
    yield (low.long() + 1).clamp(max=pixels - 1), fraction.where(inside, 0)
