# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the operators, for `torch.utils.flop_counter.FlopCounterMode` and for mmengine's counter.

The formulas count multiply-adds: torch counts two flops for each, mmengine one. They include the matrix products, and
four multiply-adds for each bilinear sample of each channel, as mmengine counts a `grid_sample`. Work that is done once
for all channels (locating a sample, scaling by a mask) is not counted.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]
PER_SAMPLE = 4  # multiply-adds of a bilinear sample of one channel: one for each corner


def convolution_size(input: Shape, weight: Shape, output: Shape) -> tuple[int, int]:
    """Return the multiply-adds of a convolution's matrix product, and the number of samples of all channels."""
    positions = output[0] * prod(output[2:])
    return positions * prod(weight), positions * input[1] * prod(weight[2:])


def samples_of_bins(rois: Any, bins: Shape, spatial_scale: float, sampling_ratio: int, aligned: bool = True) -> int:
    """Return the number of samples of all bins [N, C, ph, pw].

    With a `sampling_ratio` of 0 it depends on the regions: a bin has as many samples as pixels, rounded up. If only the
    shape of the regions is known, each bin counts one sample, which is a lower bound.
    """
    if sampling_ratio:
        return prod(bins) * sampling_ratio**2
    if type(rois) is not Tensor or rois.is_meta:  # a subclass, such as a fake tensor, may have no values
        return prod(bins)
    height, width = bins[2:]
    lengths = (rois.detach()[:, 3:5] - rois.detach()[:, 1:3]).double() * spatial_scale  # [N, 2], x and y
    if not aligned:
        lengths = lengths.clamp(min=1)
    counts = (lengths / lengths.new_tensor([width, height])).ceil().clamp(min=0)
    counts = torch.where(lengths.isfinite(), counts, 1)
    return int(counts.prod(1).sum().item()) * bins[1] * height * width


@register_flop_formula(torch.ops.mmdcn.deform_conv2d)
def _deform_conv2d(input: Shape, offset: Shape, mask: Any, weight: Shape, *_: Any, out_shape: Shape) -> int:
    product, samples = convolution_size(input, weight, out_shape)
    return 2 * (product + PER_SAMPLE * samples)


@register_flop_formula(torch.ops.mmdcn.deform_conv2d_backward)
def _deform_conv2d_backward(
    grad_output: Shape, input: Shape, offset: Shape, mask: Any, weight: Shape, *settings: Any, out_shape: Any
) -> int:
    """Count the gradients that are needed: the weight's needs the samples again, the offset's the slopes in y and x."""
    product, samples = convolution_size(input, weight, grad_output)
    of_input, of_offset, of_mask, of_weight = settings[-2]
    products = (of_input or of_offset or of_mask) + of_weight
    return 2 * (products * product + (of_input + 2 * of_offset + of_mask + of_weight) * PER_SAMPLE * samples)


@register_flop_formula(torch.ops.mmdcn.deform_roi_pool, get_raw=True)
def _deform_roi_pool(
    input: Tensor, rois: Tensor, offset: Any, output_size: Any, spatial_scale: float, sampling_ratio: int,
    gamma: float, aligned: bool = True, *, out_val: Tensor,
) -> int:  # fmt: skip
    return 2 * PER_SAMPLE * samples_of_bins(rois, out_val.shape, spatial_scale, sampling_ratio, aligned)


@register_flop_formula(torch.ops.mmdcn.deform_roi_pool_backward, get_raw=True)
def _deform_roi_pool_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Any, spatial_scale: float, sampling_ratio: int,
    gamma: float, output_mask: Sequence[bool], deterministic: bool, aligned: bool = True, *,
    out_val: Any,
) -> int:  # fmt: skip
    samples = samples_of_bins(rois, grad_output.shape, spatial_scale, sampling_ratio, aligned)
    return 2 * PER_SAMPLE * samples * (output_mask[0] + 2 * output_mask[1])
