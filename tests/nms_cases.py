# SPDX-License-Identifier: Apache-2.0
"""Boxes to suppress."""

import torch
from torch import Tensor


def draw(count: int, device: str = 'cpu', dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Boxes of whole pixels, many of which overlap, some of which have no size; some scores are equal."""
    generator = torch.Generator().manual_seed(count)
    first = torch.randint(0, 40, (count, 2), generator=generator)
    size = torch.randint(0, 25, (count, 2), generator=generator)
    scores = torch.randint(0, 2 * count + 1, (count,), generator=generator) / (2 * count + 1)
    return torch.cat([first, first + size], 1).to(device, dtype), scores.to(device, dtype)
