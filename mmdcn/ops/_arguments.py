# SPDX-License-Identifier: Apache-2.0
"""What the operators ask of their arguments, and how they say it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]  # (y, x)

FLOATING_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """Give (y, x) from one integer or two, none less than the minimum."""
    both = (value, value) if isinstance(value, int | torch.SymInt) else tuple(value)
    if len(both) != 2:
        raise ValueError(f'{name} must be an integer or a pair (y, x), got {value}')
    if both[0] < minimum or both[1] < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')
    return both


def check(condition: bool, name: str, got: Any, expected: str) -> None:
    """Raise a ValueError that names the argument, what it was and what it should have been."""
    if not condition:
        raise ValueError(f'{name} must {expected}, got {got}')


def check_floating(tensor: Tensor, name: str, rank: int, layout: str) -> None:
    """Check that an argument is a floating-point tensor of a rank."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f'{name} must be a tensor {layout}, got {type(tensor).__name__}')
    check(tensor.dim() == rank, name, f'shape {list(tensor.shape)}', f'have {rank} dimensions {layout}')
    check(
        tensor.dtype in FLOATING_TYPES, name, tensor.dtype, 'be of type float64, float32, float16 or bfloat16'
    )


def check_like(tensor: Tensor, name: str, like: Tensor, *types: torch.dtype) -> None:
    """Check that an argument is of one of the types, and on the device of the input."""
    check(tensor.dtype in types, name, tensor.dtype, f'be of type {" or ".join(map(str, dict.fromkeys(types)))}')
    check(tensor.device == like.device, name, tensor.device, f'be on the device of input, {like.device}')


def check_shape(tensor: Tensor, name: str, layout: str, *sizes: int) -> None:
    """Check an argument's sizes; `layout` tells what they mean."""
    same = len(tensor.shape) == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes, strict=True))
    check(same, name, f'shape {list(tensor.shape)}', f'have shape {layout} = {list(sizes)}')
