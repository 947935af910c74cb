# SPDX-License-Identifier: Apache-2.0
"""A good call of deform_conv2d, from which the tests of its errors make bad ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Make = Callable[[], Tensor]


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> Make:
    return partial(torch.zeros, shape, dtype=dtype, device=device)


# K = 6 taps, 2 groups, 2 offset groups, output 4 x 6
GOOD: dict[str, Any] = {
    'input': zeros(3, 4, 7, 8),
    'offset': zeros(3, 24, 4, 6),
    'weight': zeros(10, 2, 3, 2),
    'bias': zeros(10),
    'stride': (2, 1),
    'padding': (1, 0),
    'dilation': (1, 2),
    'mask': zeros(3, 12, 4, 6),
}

HALF, DOUBLE, LONG = torch.float16, torch.float64, torch.int64
FLOATING = 'float64, float32, float16 or bfloat16'


def make_arguments(changes: dict[str, Any]) -> dict[str, Any]:
    arguments = {**GOOD, **changes}
    return {name: value() if callable(value) else value for name, value in arguments.items()}
