# SPDX-License-Identifier: Apache-2.0
"""Offsets and masks with more positions than the output.

DyHead and GLIP apply the offsets and masks of a finer level to the features of a coarser one. mmcv reads the first
values of each image, row by row, as a smaller map. Weights trained with mmcv need the same behaviour.
"""

import math

import torch.nn.functional as F
from torch import Tensor


def first_values(
    maps: Tensor,  # [B, C, H, W]
    size: tuple[int, ...],  # (H_out, W_out)
) -> Tensor:  # [B, C, H_out, W_out]
    """Return the first values of each image as a map of the output's size."""
    if maps.shape[2:].numel() <= math.prod(size):
        return maps  # of the right size, or too small, which the operator rejects
    count = maps.shape[1] * math.prod(size)
    return maps.flatten(1)[:, :count].unflatten(1, (maps.shape[1], *size))


def add_to_first_values(
    maps: Tensor,  # [B, C, H, W]
    gradient: Tensor,  # [B, C, H_out, W_out]
) -> None:
    """Add a gradient to the first values of each image, in any memory format."""
    rest = maps.shape[1:].numel() - gradient.shape[1:].numel()
    maps.add_(F.pad(gradient.flatten(1), (0, rest)).view(maps.shape))
