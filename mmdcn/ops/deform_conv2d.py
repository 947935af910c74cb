# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution: the function, and the registration of its operator with torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdcn import reference
from mmdcn.ops._arguments import (
    Pair,
    allow_tf32,
    check,
    check_floating,
    check_like,
    check_output_mask,
    check_shape,
    count,
    overridable,
)
from mmdcn.ops._autocast import autocast
from mmdcn.ops._conv_arguments import check_arguments, conv_geometry, output_size, weight_groups
from mmdcn.ops._fake import empty_gradient, memory_format
from mmdcn.ops._transforms import into_batch, into_channels, pull_back, register, unfold

_OP = 'mmdcn::deform_conv2d'
_BACKWARD_OP = 'mmdcn::deform_conv2d_backward'


@overridable
def deform_conv2d(
    input: Tensor,  # [B, C_in, H, W]
    offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,  # [B, G*K, H_out, W_out]
    *,
    packed_weight: Tensor | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Convolve with taps that are shifted by offsets and scaled by a mask, different at each output position.

    Without a mask this is DCNv1 (Dai et al., Deformable Convolutional Networks, ICCV 2017,
    section 2.1), with one it is DCNv2 (Zhu et al., Deformable ConvNets v2, CVPR 2019, section 3.2).
    Sampling is bilinear, and the image is zero outside. With zero offsets and no mask, this is a
    plain convolution.

    The kernel has K = kh * kw taps, numbered row by row. The shape of the weight determines
    `groups`, and the shape of the offsets determines the number of offset groups G. Each group of
    C_in / G channels has its own offsets and mask.

    Args:
        input: Images, in float64, float32, float16 or bfloat16, with any strides. The output has
            their memory format.
        offset: Offsets in pixels of the input, of any length: channel (g*K + k)*2 holds y and (g*K + k)*2 + 1 holds x
            of tap k in offset group g. They have the type of the input; with float16 or bfloat16 input, they may be
            float32. An infinite offset samples zero, a NaN gives NaN.
        weight: The kernel, in the type of the input.
        bias: Added to each output channel; in the type of the input.
        stride: Step between output positions in pixels, at least 1; one integer or (y, x).
        padding: Zeros on each side in pixels, at least 0; one integer or (y, x).
        dilation: Step between taps in pixels, at least 1; one integer or (y, x).
        mask: A factor for each sample, of any value (DCNv2 uses 0 to 1): channel g*K + k holds that
            of tap k in offset group g. It has the type of the offset.
        packed_weight: The same weight as `pack_weight` returns it, for a CPU; else it has no effect.

    Returns:
        The images of size H_out = (H + 2*padding - dilation*(kh - 1) - 1) // stride + 1, likewise
        W_out, in the type of the input. Under autocast they have autocast's type, while the offsets
        and the mask are in float32.

    Raises:
        ValueError: If the rank, shape, type or device of an argument does not fit, or the output would be empty, or a
            stride, padding or dilation is too small, or is 2^31 or more.
        RuntimeError: If `packed_weight` does not have the size or the type of the packed weight.
    """
    given = weight
    (input, weight, bias), (offset, mask) = autocast((input, weight, bias), (offset, mask))
    packed_weight = packed_weight if weight is given else None
    geometry = conv_geometry(stride, padding, dilation)
    if torch.compiler.is_compiling():
        check_arguments(input, offset, weight, bias, *geometry, mask)
    try:
        groups = weight_groups(input, offset, weight)
        return _convolve(input, offset, mask, weight, bias, *geometry, *groups, allow_tf32(input), packed_weight)
    except Exception:
        check_arguments(input, offset, weight, bias, *geometry, mask)  # rejects what the operator rejects, and says why
        raise


def pack_weight(
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    groups: int = 1,
) -> Tensor:
    """Pack a weight for repeated calls of `deform_conv2d` on a CPU.

    The result depends on the instruction set of the processor: do not store it. It does not follow changes of the
    weight. `mmdcn.prepack` packs the weights of a whole model, and does not use them after a change.

    Args:
        weight: The kernel, in float64, float32, float16 or bfloat16, on a CPU. In bfloat16 it has no effect if the
            processor multiplies in this type.
        groups: Number of groups of the weight, at least 1.

    Returns:
        A tensor of one dimension, in float64 for a float64 weight, otherwise in float32.

    Raises:
        ValueError: If the weight has a wrong rank or type, or is empty or not on a CPU, or the groups do not divide its
            output channels.
    """
    check_floating(weight, 'weight', 4, '[C_out, C_in/groups, kh, kw]')
    groups = count(groups, 'groups', 1)
    check(weight.device.type == 'cpu', lambda: f'weight must be on a CPU, got {weight.device}')
    check(weight.numel() > 0, lambda: f'weight must have no empty dimension, got shape {list(weight.shape)}')
    check(
        weight.shape[0] % groups == 0,
        lambda: f'weight must have a C_out that its {groups} groups divide, got C_out = {weight.shape[0]}',
    )
    packed: Tensor = torch.ops.mmdcn.deform_conv2d_pack_weight(weight.detach(), groups)
    return packed


def _reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_groups: int,
    allow_tf32: bool,
    packed_weight: Tensor | None = None,
) -> Tensor:
    check_arguments(input, offset, weight, bias, stride, padding, dilation, mask)  # the reference broadcasts
    return reference.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def _reference_backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors_and_geometry, output_mask = arguments[:8], arguments[10]
    gradients: Any = reference.deform_conv2d_backward(*tensors_and_geometry)
    placeholder = arguments[0].new_empty(0)
    return tuple(grad if needed else placeholder for grad, needed in zip(gradients, output_mask, strict=True))


@torch.library.register_fake(_OP)
def _fake(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_groups: int,
    allow_tf32: bool = False,
    packed_weight: Tensor | None = None,
) -> Tensor:
    shape = _output_shape(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups)
    if packed_weight is not None:
        check_like(packed_weight, 'packed_weight', input, packed_weight.dtype)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _output_shape(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_groups: int,
) -> tuple[int, ...]:
    """Check everything that the operator checks, and return [B, C_out, H_out, W_out]."""
    geometry = conv_geometry(stride, padding, dilation)
    expected = check_arguments(input, offset, weight, bias, *geometry, mask)
    check(
        (groups, offset_groups) == expected,
        lambda: f'groups and offset_groups must be {expected} by the shapes, got {(groups, offset_groups)}',
    )
    return (input.shape[0], weight.shape[0], *output_size(input, weight, *geometry))


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_groups: int,
    output_mask: Sequence[bool],
    deterministic: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = _output_shape(input, offset, mask, weight, None, stride, padding, dilation, groups, offset_groups)
    check_floating(grad_output, 'grad_output', 4, '[B, C_out, H_out, W_out]')
    check_shape(grad_output, 'grad_output', '[B, C_out, H_out, W_out]', *shape)
    check_like(grad_output, 'grad_output', input, input.dtype)
    check_output_mask(output_mask, 4, 2, 'mask', mask)
    return (
        empty_gradient(output_mask[0], input, memory_format(input)),
        empty_gradient(output_mask[1], offset),
        empty_gradient(output_mask[2], offset if mask is None else mask),
        empty_gradient(output_mask[3], weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:4])  # without the bias, which may change before the backward


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    needs_input, needs_offset, needs_mask, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    output_mask = (needs_input, needs_offset, needs_mask, needs_weight)
    gradients: tuple[Tensor | None, ...] = (None, None, None, None)
    if any(output_mask):
        *geometry, allow_tf32 = ctx.settings[:6]  # without the packed weight, which the backward does not use
        settings = (*geometry, output_mask, torch.are_deterministic_algorithms_enabled(), allow_tf32)
        gradients = _convolve_backward(grad_output, input, offset, mask, weight, *settings)
    return (
        gradients[0] if needs_input else None,
        gradients[1] if needs_offset else None,
        gradients[2] if needs_mask else None,
        gradients[3] if needs_weight else None,
        _grad_bias(grad_output) if needs_bias else None,
        None,  # stride
        None,  # padding
        None,  # dilation
        None,  # groups
        None,  # offset_groups
        None,  # allow_tf32
        None,  # packed_weight
    )


def _grad_bias(grad_output: Tensor) -> Tensor:
    # torch splits a sum with a single result among its threads, so the bits depend on the number of threads. With two
    # results, one thread computes each; so a single channel is summed twice.
    if grad_output.shape[1] == 1:
        return grad_output.expand(-1, 2, -1, -1).sum((0, 2, 3))[:1]
    return grad_output.sum((0, 2, 3))


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the reference's backward; it consists of torch's operators, so derivatives of every order work."""
    return pull_back(_reference_backward, ctx.saved_tensors, ctx.settings, grads)


def _vmap(convolve: Callable[..., Tensor], info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Tensor, int]:
    """Merge V calls into one: with V times the images if all share weight and bias, else with V times the groups."""
    size = info.batch_size
    input, offset, mask, weight, bias, *geometry, groups, offset_groups = arguments[:10]
    defaults = arguments[10:]  # of arguments that a call may leave out: allow_tf32, packed_weight
    input_dim, offset_dim, mask_dim, weight_dim, bias_dim, *_ = in_dims
    shared = weight_dim is None and bias_dim is None
    fold, dim = (into_batch, 0) if shared else (into_channels, 1)
    images = (
        fold(size, input_dim, input),
        fold(size, offset_dim, offset),
        fold(size, mask_dim, mask),
    )
    if not shared:
        weight, bias = into_batch(size, weight_dim, weight), into_batch(size, bias_dim, bias)
        groups, offset_groups = size * groups, size * offset_groups
        defaults = defaults[:1]  # the packed weight is that of a single call
    output = convolve(*images, weight, bias, *geometry, groups, offset_groups, *defaults)
    return unfold(size, dim, output), dim


def _vmap_backward(
    convolve_backward: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Merge V calls into one like `_vmap`; if the weight needs a gradient, each call gets its own."""
    size = info.batch_size
    *images, weight = arguments[:5]  # grad_output, input, offset, mask
    *geometry, groups, offset_groups, output_mask, deterministic = arguments[5:12]
    defaults = arguments[12:]
    shared = in_dims[4] is None and not output_mask[3]
    fold, dim = (into_batch, 0) if shared else (into_channels, 1)
    images = [fold(size, *image) for image in zip(in_dims[:4], images, strict=True)]
    if not shared:
        weight = into_batch(size, in_dims[4], weight)
        groups, offset_groups = size * groups, size * offset_groups
    settings = (*geometry, groups, offset_groups, output_mask, deterministic, *defaults)
    gradients = convolve_backward(*images, weight, *settings)
    dims = tuple(d if needed else None for d, needed in zip((dim, dim, dim, 0), output_mask, strict=True))
    gradients = tuple(grad if d is None else unfold(size, d, grad) for grad, d in zip(gradients, dims, strict=True))
    return gradients, dims


_convolve = register('deform_conv2d', _reference, _setup_context, _backward, _vmap)
_convolve_backward = register(
    'deform_conv2d_backward', _reference_backward, _setup_backward_context, _double_backward, _vmap_backward
)
