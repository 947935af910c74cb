# SPDX-License-Identifier: Apache-2.0
"""What the operators ask of their arguments, and how they say it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]  # (y, x)

FLOATING_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """Give (y, x) from one integer or two, none less than the minimum."""
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(isinstance(one, int | torch.SymInt) for one in both):
        raise ValueError(f'{name} must be an integer or a pair (y, x) of integers, got {value!r}')
    if both[0] < minimum or both[1] < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')
    return both


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raise a ValueError with a message that says what was expected, and what came.

    The message is a function because torch.compile takes a size that is formatted for a constant.
    """
    if not condition:
        raise ValueError(message())


def check_floating(tensor: Any, name: str, rank: int, layout: str) -> None:
    """Check that an argument is a floating-point tensor of a rank; `layout` tells what its sizes mean."""
    check(isinstance(tensor, Tensor), lambda: f'{name} must be a tensor {layout}, got {type(tensor).__name__}')
    check(
        tensor.layout == torch.strided,
        lambda: f'{name} must be a dense tensor, of layout torch.strided, got {tensor.layout}',
    )
    check(
        tensor.dim() == rank,
        lambda: f'{name} must have {rank} dimensions {layout}, got shape {list(tensor.shape)}',
    )
    check(
        tensor.dtype in FLOATING_TYPES,
        lambda: f'{name} must be of type float64, float32, float16 or bfloat16, got {tensor.dtype}',
    )


def check_like(tensor: Tensor, name: str, like: Tensor, *types: torch.dtype) -> None:
    """Check that an argument is of one of the types, and on the device of the input."""
    check(
        tensor.dtype in types,
        lambda: f'{name} must be of type {" or ".join(map(str, dict.fromkeys(types)))}, got {tensor.dtype}',
    )
    check(
        tensor.device == like.device,
        lambda: f'{name} must be on the device of input, {like.device}, got {tensor.device}',
    )


def check_shape(tensor: Tensor, name: str, layout: str, *sizes: int) -> None:
    """Check the sizes of an argument of the right rank; `layout` tells what they mean."""
    check(
        all(got == size for got, size in zip(tensor.shape, sizes, strict=True)),
        lambda: f'{name} must have shape {layout} = {list(sizes)}, got shape {list(tensor.shape)}',
    )
