# SPDX-License-Identifier: Apache-2.0
"""Outputs for fake tensors; their real counterparts are in csrc/core/stable_ops.h."""

import torch
from torch import Tensor


def memory_format(images: Tensor) -> torch.memory_format:
    """Return the memory format that matches the strides of a tensor [B, C, H, W]."""
    channels_last = images.shape[1] > 1 and images.stride(1) == 1 and images.stride(3) >= images.shape[1]
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_gradient(needed: bool, tensor: Tensor, format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return an empty gradient of a tensor; a gradient that is not needed has no elements."""
    if not needed:
        return tensor.new_empty(0)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=format)
