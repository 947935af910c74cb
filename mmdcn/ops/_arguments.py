# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the operators, with their error messages."""

import operator
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mmdcn._private_hooks import convolution_precision

Parameters = ParamSpec('Parameters')

Pair = tuple[int, int]  # (y, x)

LIMIT = 2**31  # of integer arguments, so that no sum or product of them overflows the core's 64-bit integers

FLOATING_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """Return (y, x) from one integer or a pair; each must be at least `minimum` and less than 2^31."""
    y, x = value if type(value) is tuple and len(value) == 2 else (value, value)
    if type(y) is int and type(x) is int and minimum <= y < LIMIT and minimum <= x < LIMIT:
        return y, x  # nearly always; what follows takes several times as long
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(_is_integer(one) for one in both):
        raise ValueError(f'{name} must be an integer or a pair (y, x) of integers, got {value!r}')
    if both[0] < minimum or both[1] < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')
    if both[0] >= LIMIT or both[1] >= LIMIT:
        raise ValueError(f'{name} must be less than 2^31, got {value}')
    return _as_int(both[0]), _as_int(both[1])


def count(value: int, name: str, minimum: int = 0) -> int:
    """Return the value as an integer; it must be at least `minimum` and less than 2^31."""
    if not _is_integer(value) or value < minimum:
        raise ValueError(f'{name} must be an integer, {minimum} or more, got {value!r}')
    if value >= LIMIT:
        raise ValueError(f'{name} must be less than 2^31, got {value}')
    return _as_int(value)


def _is_integer(value: Any) -> bool:
    if isinstance(value, int | torch.SymInt):
        return True
    try:
        operator.index(value)  # numpy's integers support it
    except TypeError:
        return False
    return True


def _as_int(value: Any) -> Any:
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raise a ValueError if the condition is false; its message says what was expected and what was given.

    The message is a function, because torch.compile specializes on a size that is formatted into a string.
    """
    if not condition:
        raise ValueError(message())


def check_floating(tensor: Any, name: str, rank: int, layout: str) -> None:
    """Check that an argument is a floating-point tensor of this rank; `layout` names its dimensions."""
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
    """Check that an argument has one of the types and is on the device of the input."""
    check(
        tensor.dtype in types,
        lambda: f'{name} must be of type {" or ".join(map(str, dict.fromkeys(types)))}, got {tensor.dtype}',
    )
    check(
        tensor.device == like.device,
        lambda: f'{name} must be on the device of input, {like.device}, got {tensor.device}',
    )


def check_shape(tensor: Tensor, name: str, layout: str, *sizes: int) -> None:
    """Check the shape of an argument whose rank is already checked; `layout` names its dimensions."""
    check(
        all(got == size for got, size in zip(tensor.shape, sizes, strict=True)),
        lambda: f'{name} must have shape {layout} = {list(sizes)}, got shape {list(tensor.shape)}',
    )


def check_output_mask(output_mask: Sequence[bool], count: int, index: int, name: str, tensor: Tensor | None) -> None:
    """Check the flags that select gradients; only the tensor of the flag at `index` may be None."""
    check(
        len(output_mask) == count,
        lambda: f'output_mask must have {count} elements, got {len(output_mask)}',
    )
    check(
        tensor is not None or not output_mask[index],
        lambda: f'output_mask asks for the gradient of {name}, but there is no {name}',
    )


def single_if_low(input: Tensor) -> list[torch.dtype]:
    """Return float32 as a further allowed type of offsets and coordinates if the input's type is narrower."""
    return [torch.float32] if input.dtype in (torch.float16, torch.bfloat16) else []


@torch.compiler.assume_constant_result  # torch.compile of torch 2.10 cannot trace this
def _cudnn_allows_tf32() -> bool:
    return convolution_precision() == 'tf32'


def allow_tf32(input: Tensor) -> bool:
    """Tell whether float32 products may use TF32, by torch's setting for convolutions."""
    return input.dtype == torch.float32 and input.is_cuda and _cudnn_allows_tf32()


def overridable(function: Callable[Parameters, Tensor]) -> Callable[Parameters, Tensor]:
    """Make a function overridable by `__torch_function__`, like torch's own; torch.fx then records it as one node."""

    @wraps(function)
    def public(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Tensor:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(public, given, *args, **kwargs)
        return function(*args, **kwargs)

    return public
