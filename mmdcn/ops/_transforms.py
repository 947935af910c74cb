# SPDX-License-Identifier: Apache-2.0
"""Derivatives and vmap of the operators, in reverse and forward mode, in eager code and under torch.compile.

Note: [Three ways to run]
torch.compile calls the operator, which has a reverse-mode derivative; torch.compile needs no other.
Eager code and the transforms of torch.func (grad, vmap) call an autograd function, because the transforms do not see
through an operator. The function runs the operator and its backward.
Forward mode runs the reference. An operator silently drops tangents, and forward over forward mode through an autograd
function gives wrong numbers (in torch 2.13, for any autograd function).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmdcn._extension import check_device
from mmdcn._private_hooks import (
    any_requires_grad,
    apply_quickly,
    below_autograd,
    is_transformed,
    may_have_tangents,
    unwrap_dead_wrappers,
)


def _has_tangent(arguments: Sequence[Any]) -> bool:
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def register(
    name: str,
    reference: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
) -> Callable[..., Any]:
    """Register the derivative and the vmap rule of an operator, and return the function that calls it.

    Args:
        name: Name of the operator in `torch.ops.mmdcn`.
        reference: The same function of the same arguments, in torch's operators.
        setup_context: The method of this name of the autograd function.
        backward: Likewise.
        vmap: Likewise, with an additional first argument: the function that computes all mapped calls at once.
    """
    operator = getattr(torch.ops.mmdcn, name).default
    torch.library.register_autograd(f'mmdcn::{name}', backward, setup_context=setup_context)
    torch.library.register_vmap(f'mmdcn::{name}', partial(vmap, operator))

    def forward(*arguments: Any) -> Any:
        with below_autograd():
            return operator(*arguments)

    def call(*arguments: Any) -> Any:
        """Run the operator in the way that suits the transform around the call: see Note [Three ways to run]."""
        transformed = is_transformed()
        if may_have_tangents() and (transformed or _has_tangent(arguments)):
            return reference(*arguments)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return (autograd_function.apply if transformed else operator)(*arguments)
        # A fake tensor may be on a device that does not exist.
        if arguments[0].is_cuda and torch.cuda.is_initialized():
            check_device(arguments[0].device)
        if transformed:
            return autograd_function.apply(*arguments)
        if torch.is_grad_enabled():
            # A tensor may outlive its transform, as in the function that torch.func.vjp returns. Its own graph is dead.
            arguments = unwrap_dead_wrappers(arguments)
            if any_requires_grad(*arguments):
                return apply_quickly(autograd_function, *arguments)
        return forward(*arguments)

    methods: dict[str, Any] = {
        'forward': staticmethod(forward),
        'setup_context': staticmethod(setup_context),
        'backward': staticmethod(backward),
        'vmap': staticmethod(partial(vmap, call)),
    }
    autograd_function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), methods)
    return call


def pull_back(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], settings: Sequence[Any], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a function's arguments (tensors, then settings) from those of its results."""

    def of_present(*present: Tensor) -> Any:
        values = iter(present)
        return function(*(None if tensor is None else next(values) for tensor in tensors), *settings)

    vjp = torch.func.vjp(of_present, *(tensor for tensor in tensors if tensor is not None))[1]
    results = iter(vjp(tuple(grads)))
    return (*(None if tensor is None else next(results) for tensor in tensors), *[None] * len(settings))


def into_batch(size: int, dim: int | None, tensor: Tensor | None) -> Tensor | None:
    """Reshape a tensor [B, ...], mapped V times along dim, to [V*B, ...]."""
    return None if tensor is None else _mapped_first(size, dim, tensor).flatten(0, 1)


def into_channels(size: int, dim: int | None, tensor: Tensor | None) -> Tensor | None:
    """Reshape a tensor [B, C, ...], mapped V times along dim, to [B, V*C, ...]."""
    if tensor is None:
        return None
    return _mapped_first(size, dim, tensor).movedim(0, 1).flatten(1, 2)


def unfold(size: int, dim: int, tensor: Tensor) -> Tensor:
    """Split a dimension into its V parts: [..., V*N, ...] to [..., V, N, ...]."""
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size))


def _mapped_first(size: int, dim: int | None, tensor: Tensor) -> Tensor:  # [V, ...]
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
