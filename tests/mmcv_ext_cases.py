# SPDX-License-Identifier: Apache-2.0
"""The images, regions and calls that the tests of mmdcn.openmmlab.mmcv_ext share."""

from typing import Any

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape)), dtype=dtype)


def draw_rois(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Regions on two images of 5 x 9 pixels at scale 1/4, some of which leave the image, some of which are tiny."""
    g = generator(count)
    first = 40 * torch.rand(count, 2, generator=g, dtype=dtype) - 8
    size = 30 * torch.rand(count, 2, generator=g, dtype=dtype) ** 2
    images = torch.arange(count)[:, None] % 2
    return torch.cat([images.to(dtype), first, first + size], 1)


def run_roi_align(module: Any, input: Tensor, rois: Tensor, ratio: int, mode: int, aligned: bool) -> list[Tensor]:
    """Return RoIAlign's output, the places of its maxima, and the gradient of the input."""
    output = input.new_zeros(len(rois), input.shape[1], 3, 2)
    argmax = [torch.zeros_like(output if mode == 0 else input[:0]) for _ in range(2)]
    settings = dict(
        aligned_height=3, aligned_width=2, spatial_scale=0.25, sampling_ratio=ratio, pool_mode=mode, aligned=aligned
    )
    module.roi_align_forward(input, rois, output, *argmax, **settings)
    grad_input = torch.zeros_like(input)
    module.roi_align_backward(randn(*output.shape).to(input.dtype), rois, *argmax, grad_input, **settings)
    return [output, *argmax, grad_input]
