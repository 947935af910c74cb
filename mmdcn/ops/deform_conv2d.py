# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution: the function, and what torch must know about its operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmdcn import reference
from mmdcn.ops._arguments import Pair, check, check_floating, check_like, check_shape, pair

_OP = 'mmdcn::deform_conv2d'
_BACKWARD_OP = 'mmdcn::deform_conv2d_backward'


def deform_conv2d(
    input: Tensor,  # [B, C_in, H, W]
    offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,  # [B, G*K, H_out, W_out]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Convolve with taps that each output position moves by its own offsets and scales by its own mask.

    Without a mask this is DCNv1 (Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.1), with one
    it is DCNv2 (Zhu et al., Deformable ConvNets v2, CVPR 2019, section 3.2). Sampling is bilinear; outside the
    image all is zero. With zero offsets and no mask, it is a convolution.

    The kernel has K = kh * kw taps, numbered row by row. `groups` follows from the shape of the weight, the number
    of offset groups G from that of the offsets; each group of C_in / G channels has its own offsets and mask.

    Args:
        input: Images, in float64, float32, float16 or bfloat16; of any strides. The output has its memory format.
        offset: Offsets in pixels of the input, of any size: channel (g*K + k)*2 holds y and (g*K + k)*2 + 1 holds x
            of tap k in offset group g. In the type of the input, or in float32. An infinite offset samples zero, a
            NaN gives NaN.
        weight: The kernel, in the type of the input.
        bias: Added to each output channel; in the type of the input.
        stride: Step between output positions in pixels, at least 1; one integer or (y, x).
        padding: Zeros on each side in pixels, at least 0; one integer or (y, x).
        dilation: Step between taps in pixels, at least 1; one integer or (y, x).
        mask: A factor for each sample, of any value (DCNv2 uses 0 to 1): channel g*K + k. In the type of the offset.

    Returns:
        The images of size H_out = (H + 2*padding - dilation*(kh - 1) - 1) // stride + 1, likewise W_out, in the type
        of the input; under autocast, in autocast's type, while the offsets and the mask keep float32.

    Raises:
        ValueError: If an argument's rank, shape, type or device does not fit, or the output would be empty.
    """
    input, offset, weight, bias, mask = _autocast(input, offset, weight, bias, mask)
    step, pad, gap = pair(stride, 'stride', 1), pair(padding, 'padding', 0), pair(dilation, 'dilation', 1)
    groups, offset_groups = _check(input, offset, weight, bias, step, pad, gap, mask)
    if _has_tangent(input, offset, weight, bias, mask):
        return reference.deform_conv2d(input, offset, weight, bias, step, pad, gap, mask)
    return torch.ops.mmdcn.deform_conv2d(input, offset, mask, weight, bias, step, pad, gap, groups, offset_groups)


def _autocast(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Any:
    """Bring the tensors to autocast's type, but the offsets and the mask to float32: a place needs its digits."""
    tensors = (input, offset, weight, bias, mask)
    if not isinstance(input, Tensor) or not torch.is_autocast_enabled(input.device.type):
        return tensors
    low = torch.get_autocast_dtype(input.device.type)
    types = (low, torch.float32, low, low, torch.float32)

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        # As torch's own rules do, leave float64 alone.
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return tuple(cast(tensor, dtype) for tensor, dtype in zip(tensors, types, strict=True))


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> tuple[int, int]:
    """Check every argument, and give the number of weight groups and of offset groups."""
    check_floating(input, 'input', 4, '[B, C_in, H, W]')
    check_floating(weight, 'weight', 4, '[C_out, C_in/groups, kh, kw]')
    check_floating(offset, 'offset', 4, '[B, 2*G*K, H_out, W_out]')
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    check(channels * height * width > 0, 'input', f'shape {list(input.shape)}', 'have channels and pixels')
    check(weight.numel() > 0, 'weight', f'shape {list(weight.shape)}', 'have no empty dimension')
    check(
        channels % group_channels == 0,
        'weight',
        f'C_in/groups = {group_channels}',
        f'have a C_in/groups that divides the {channels} channels of input',
    )
    groups = channels // group_channels
    check(out_channels % groups == 0, 'weight', out_channels, f'have a C_out that its {groups} groups divide')
    taps = kernel_height * kernel_width
    check(
        offset.shape[1] > 0 and offset.shape[1] % (2 * taps) == 0,
        'offset',
        f'{offset.shape[1]} channels',
        f'have a positive multiple of 2*K = {2 * taps} channels, y and x of each tap',
    )
    offset_groups = offset.shape[1] // (2 * taps)
    check(
        channels % offset_groups == 0,
        'offset',
        f'{offset.shape[1]} channels, {offset_groups} offset groups',
        f'have a number of offset groups that divides the {channels} channels of input',
    )
    out_height, out_width = _output_size(input, weight, stride, padding, dilation)
    check(
        out_height > 0 and out_width > 0,
        'input',
        f'{height} x {width} pixels',
        f'be large enough for a {kernel_height} x {kernel_width} kernel with padding {padding} and dilation '
        f'{dilation}; the output would be empty',
    )
    check_shape(
        offset, 'offset', '[B, 2*G*K, H_out, W_out]', batch, offset_groups * 2 * taps, out_height, out_width
    )
    check_like(weight, 'weight', input, input.dtype)
    check_like(offset, 'offset', input, input.dtype, *_single_if_low(input))
    if mask is not None:
        check_floating(mask, 'mask', 4, '[B, G*K, H_out, W_out]')
        check_shape(mask, 'mask', '[B, G*K, H_out, W_out]', batch, offset_groups * taps, out_height, out_width)
        check_like(mask, 'mask', input, offset.dtype)
    if bias is not None:
        check_floating(bias, 'bias', 1, '[C_out]')
        check_shape(bias, 'bias', '[C_out]', out_channels)
        check_like(bias, 'bias', input, input.dtype)
    return groups, offset_groups


def _single_if_low(input: Tensor) -> list[torch.dtype]:
    return [torch.float32] if input.dtype in (torch.float16, torch.bfloat16) else []


def _output_size(input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    def size(axis: int) -> int:
        span = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        return (input.shape[axis + 2] + 2 * padding[axis] - span) // stride[axis] + 1

    return size(0), size(1)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is at work: the operator would drop a tangent without a word."""
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _memory_format(images: Tensor) -> torch.memory_format:
    """The twin of memory_format in csrc/core/stable_ops.h."""
    channels_last = images.shape[1] > 1 and images.stride(1) == 1 and images.stride(3) >= images.shape[1]
    return torch.channels_last if channels_last else torch.contiguous_format


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
) -> Tensor:
    _check(input, offset, weight, bias, stride, padding, dilation, mask)
    size = (input.shape[0], weight.shape[0], *_output_size(input, weight, stride, padding, dilation))
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(needed: bool, tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        if not needed:
            return tensor.new_empty(0)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)

    return (
        gradient(output_mask[0], input, _memory_format(input)),
        gradient(output_mask[1], offset),
        gradient(output_mask[2], offset if mask is None else mask),
        gradient(output_mask[3], weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    needs_input, needs_offset, needs_mask, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    output_mask = (needs_input, needs_offset, needs_mask, needs_weight)
    gradients: tuple[Tensor | None, ...] = (None, None, None, None)
    if any(output_mask):
        gradients = torch.ops.mmdcn.deform_conv2d_backward(
            grad_output, input, offset, mask, weight, *ctx.geometry, output_mask
        )
    grad_input, grad_offset, grad_mask, grad_weight = (
        gradient if needed else None for gradient, needed in zip(gradients, output_mask, strict=True)
    )
    grad_bias = grad_output.sum((0, 2, 3)) if needs_bias else None
    return (
        grad_input,
        grad_offset,
        grad_mask,
        grad_weight,
        grad_bias,
        None,  # stride
        None,  # padding
        None,  # dilation
        None,  # groups
        None,  # offset_groups
    )


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_output, input, offset, mask, weight, *geometry, _, _, ctx.output_mask = inputs
    ctx.geometry = geometry
    ctx.save_for_backward(grad_output, input, offset, mask, weight)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the reference's backward, which is made of torch's own operators; so for every higher order."""
    tensors = ctx.saved_tensors
    present = [tensor for tensor in tensors if tensor is not None]

    def needed_gradients(*present: Tensor) -> tuple[Tensor, ...]:
        values = iter(present)
        arguments = [None if tensor is None else next(values) for tensor in tensors]
        gradients = reference.deform_conv2d_backward(*arguments, *ctx.geometry)
        return tuple(gradient for gradient, needed in zip(gradients, ctx.output_mask, strict=True) if needed)

    _, vjp = torch.func.vjp(needed_gradients, *present)
    results = iter(vjp(tuple(grad for grad, needed in zip(grads, ctx.output_mask, strict=True) if needed)))
    return (
        *(None if tensor is None else next(results) for tensor in tensors),
        None,  # stride
        None,  # padding
        None,  # dilation
        None,  # groups
        None,  # offset_groups
        None,  # output_mask
    )


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD_OP, _double_backward, setup_context=_setup_backward_context)
