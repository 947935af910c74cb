# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the operators, for `torch.utils.flop_counter.FlopCounterMode` and for mmengine's counter.

Multiply-adds are counted: torch counts two flops for each, mmengine one. They are those of the matrix products, and
four for each bilinear sample of each channel, as mmengine counts a `grid_sample`. What is done once for all channels
(to locate a sample, to scale by a mask) is not counted.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]
PER_SAMPLE = 4  # of one channel: its corners


def convolution_size(input: Shape, weight: Shape, output: Shape) -> tuple[int, int]:
    """Return the multiply-adds of a convolution's product, and the samples of all channels."""
    positions = output[0] * prod(output[2:])
    return positions * prod(weight), positions * input[1] * prod(weight[2:])


def samples_of_bins(rois: Any, bins: Shape, spatial_scale: float, sampling_ratio: int) -> int:
    """Return the number of samples of all bins [N, C, ph, pw].

    With a `sampling_ratio` of 0 it follows from the regions: as many as each bin has pixels. If only the shape of the
    regions is known, one for each bin is counted, the least that is possible.
    """
    if sampling_ratio:
        return prod(bins) * sampling_ratio**2
    if type(rois) is not Tensor or rois.is_meta:  # a subclass, such as a fake tensor, may have no numbers
        return prod(bins)
    height, width = bins[2:]
    lengths = (rois.detach()[:, 3:5] - rois.detach()[:, 1:3]).double() * spatial_scale  # [N, 2], x and y
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
    """Count the gradients that are needed; the weight's samples again, the offsets' slopes in y and x."""
    product, samples = convolution_size(input, weight, grad_output)
    of_input, of_offset, of_mask, of_weight = settings[-2]
    products = (of_input or of_offset or of_mask) + of_weight
    return 2 * (products * product + (of_input + 2 * of_offset + of_mask + of_weight) * PER_SAMPLE * samples)


@register_flop_formula(torch.ops.mmdcn.deform_roi_pool, get_raw=True)
def _deform_roi_pool(
    input: Tensor, rois: Tensor, offset: Any, output_size: Any, spatial_scale: float, sampling_ratio: int,
    gamma: float, *, out_val: Tensor,
) -> int:  # fmt: skip
    return 2 * PER_SAMPLE * samples_of_bins(rois, out_val.shape, spatial_scale, sampling_ratio)


@register_flop_formula(torch.ops.mmdcn.deform_roi_pool_backward, get_raw=True)
def _deform_roi_pool_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Any, spatial_scale: float, sampling_ratio: int,
    gamma: float, output_mask: Sequence[bool], deterministic: bool, *, out_val: Any,
) -> int:  # fmt: skip
    samples = samples_of_bins(rois, grad_output.shape, spatial_scale, sampling_ratio)
    return 2 * PER_SAMPLE * samples * (output_mask[0] + 2 * output_mask[1])
