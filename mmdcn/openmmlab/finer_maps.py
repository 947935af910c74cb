# SPDX-License-Identifier: Apache-2.0
"""Offsets and masks for more positions than the output has.

DyHead and GLIP give the features of a coarser level the offsets and masks of a finer one. mmcv reads the first values
of each image, row by row, as a smaller map, and weights trained this way need the same.
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
        return maps  # right, or refused by the operator
    count = maps.shape[1] * math.prod(size)
    return maps.flatten(1)[:, :count].unflatten(1, (maps.shape[1], *size))


def add_to_first_values(
    maps: Tensor,  # [B, C, H, W]
    gradient: Tensor,  # [B, C, H_out, W_out]
) -> None:
    """Add a gradient to the first values of each image, whatever the memory format."""
    rest = maps.shape[1:].numel() - gradient.shape[1:].numel()
    maps.add_(F.pad(gradient.flatten(1), (0, rest)).view(maps.shape))
