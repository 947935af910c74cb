# SPDX-License-Identifier: Apache-2.0
"""The deformable functions of `mmdcn.openmmlab.mmcv_ext`; arguments have mmcv's names."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdcn.openmmlab.finer_maps import add_to_first_values, first_values
from mmdcn.ops._arguments import allow_tf32
from mmdcn.ops.deform_conv2d import _convolve, _convolve_backward
from mmdcn.ops.deform_roi_pool import _pool, _pool_backward


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve; mmcv's workspaces `columns` and `ones`, and `im2col_step`, are not used."""
    geometry = (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    output.copy_(_convolve(input, offset, None, weight, None, *geometry, allow_tf32(input)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the gradients of input and offset."""
    geometry = (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    gradients = _gradients(gradOutput, input, offset, None, weight, geometry, (True, True, False, False))
    gradInput.add_(gradients[0])
    gradOffset.add_(gradients[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add the gradient of the weight, multiplied by `scale`."""
    geometry = (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    gradients = _gradients(gradOutput, input, offset, None, gradWeight, geometry, (False, False, False, True))
    gradWeight.add_(gradients[3], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolve; mmcv's workspaces `columns` and `ones` are not used."""
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    maps = (first_values(offset, output.shape[2:]), first_values(mask, output.shape[2:]))
    output.copy_(_convolve(input, *maps, weight, bias if with_bias else None, *geometry, allow_tf32(input)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the gradient of each tensor."""
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    maps = (first_values(offset, grad_output.shape[2:]), first_values(mask, grad_output.shape[2:]))
    gradients = _gradients(grad_output, input, *maps, weight, geometry, (True, True, True, True))
    grad_input.add_(gradients[0])
    add_to_first_values(grad_offset, gradients[1])
    add_to_first_values(grad_mask, gradients[2])
    grad_weight.add_(gradients[3])
    if with_bias:
        grad_bias.add_(grad_output.sum((0, 2, 3)))


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: tuple[Any, ...],
    needed: tuple[bool, ...],  # of input, offset, mask and weight
) -> tuple[Tensor, ...]:
    settings = (*geometry, needed, torch.are_deterministic_algorithms_enabled(), allow_tf32(input))
    return _convolve_backward(grad_output, input, offset, mask, weight, *settings)


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,  # or empty
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Pool regions; offsets shift the bins."""
    settings = ((pooled_height, pooled_width), spatial_scale, max(sampling_ratio, 0), gamma, True)
    output.copy_(_pool(input, rois, offset if offset.numel() else None, *settings))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Add the gradients of input and offset."""
    moves = bool(offset.numel())
    settings = (spatial_scale, max(sampling_ratio, 0), gamma, (True, moves))
    gradients = _pool_backward(
        grad_output,
        input,
        rois,
        offset if moves else None,
        *settings,
        torch.are_deterministic_algorithms_enabled(),
        True,
    )
    grad_input.add_(gradients[0])
    if moves:
        grad_offset.add_(gradients[1])


def ms_deform_attn_forward(
    value: Tensor,  # [B, K, M, D]; M heads of D channels, at the K pixels of all levels
    value_spatial_shapes: Tensor,  # [L, 2], (height, width) of each level
    value_level_start_index: Tensor,
    sampling_locations: Tensor,  # [B, Q, M, L, P, 2], (x, y) relative to the level's size, from 0 to 1
    attention_weights: Tensor,  # [B, Q, M, L, P]
    im2col_step: int,
) -> Tensor:  # [B, Q, M*D]
    """Attend to P samples of each level (Zhu et al., Deformable DETR, ICLR 2021, section 4.1)."""
    batch, _, heads, _ = value.shape
    pixels = value.permute(0, 2, 3, 1).flatten(0, 1)  # [B*M, D, K]
    places = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # [B*M, Q, L, P, 2]
    shares = attention_weights.transpose(1, 2).flatten(0, 1)[:, None]  # [B*M, 1, Q, L, P]
    sizes = value_spatial_shapes.tolist()
    levels = pixels.split([height * width for height, width in sizes], 2)
    attended = []
    for number, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        samples = F.grid_sample(level.unflatten(2, size), places[:, :, number], align_corners=False)
        attended.append((samples * shares[:, :, :, number]).sum(3))  # [B*M, D, Q]
    return torch.stack(attended).sum(0).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients of values, sampling locations and attention weights."""
    value, places, weights = (
        tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)
    )
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, places, weights, im2col_step
        )
    gradients = torch.autograd.grad(output, (value, places, weights), grad_output)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.add_(gradient)
