# SPDX-License-Identifier: Apache-2.0
"""The tensors in the forward and backward pass of a deformable layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdcn.ops import deform_conv2d
from mmdcn.reference.deform_conv2d import corner_values, interpolate, locate, slopes
from mmdcn.visualization.sampling import Sampling, watched


class Step(NamedTuple):
    """One tensor of the computation."""

    name: str
    axes: str  # the names of its axes, such as 'B, C_in, H, W'
    value: Tensor


def steps_of(layer: Any, input: Tensor) -> list[Step]:
    """Compute the forward and backward pass of a layer step by step, with the formulas of the reference.

    B images; C_in channels in G offset groups; K = kh * kw taps; P = H_out * W_out positions. The gradient of the
    output is all ones. The results equal those of the operator, which never stores most of these tensors.

    Args:
        layer: A packed deformable convolution, with groups = 1.
        input: [B, C_in, H, W]

    Raises:
        ValueError: If the layer is of another kind.
    """
    if not hasattr(layer, 'conv_offset') or layer.groups != 1:
        raise ValueError(f'layer must be a packed deformable convolution with groups = 1, got {layer}')
    seen: list[Sampling] = []
    with torch.no_grad(), watched(layer, lambda _, sampling: seen.append(sampling)):
        output = layer(input)
        offset = seen[0].offset.flatten(1, 3)  # [B, 2*G*K, H_out, W_out]
        mask = None if seen[0].mask is None else seen[0].mask.flatten(1, 2)
        return _steps(layer, input, offset, mask, output)


def _steps(layer: Any, input: Tensor, offset: Tensor, mask: Tensor | None, output: Tensor) -> list[Step]:
    weight = layer.weight
    cell = locate(offset, input.shape, weight.shape, layer.stride, layer.padding, layer.dilation)
    corners = corner_values(input, cell)  # [4, B, G, C, K, P]
    sampled = interpolate(corners, cell)  # [B, G, C, K, P]
    scale = torch.ones_like(sampled[:, :, :1]) if mask is None else mask.reshape(sampled[:, :, :1].shape)
    columns = (sampled * scale).flatten(1, 2).flatten(1, 2)  # [B, C_in*K, P]
    matrix = weight.flatten(1)  # [C_out, C_in*K]

    grad_output = torch.ones_like(output)
    grad_columns = matrix.T @ grad_output.flatten(2)
    grad_products = grad_columns.reshape(sampled.shape)
    grad_sampled = grad_products * scale
    sensitivity = torch.stack(slopes(corners, cell), dim=4)  # [B, G, C, K, 2, P]
    grad_offset = (grad_sampled.unsqueeze(4) * sensitivity).sum(2).reshape(offset.shape)
    grad_mask = None if mask is None else (grad_products * sampled).sum(2).reshape(mask.shape)
    grad_weight = torch.einsum('bop,bkp->ok', grad_output.flatten(2), columns).reshape(weight.shape)

    modulated = [] if mask is None else [Step('mask', 'B, G*K, H_out, W_out', mask)]
    grad_modulated = [] if grad_mask is None else [Step("mask's gradient", 'B, G*K, H_out, W_out', grad_mask)]
    return [
        Step('input', 'B, C_in, H, W', input),
        Step('offset', 'B, 2*G*K, H_out, W_out', offset),
        *modulated,
        Step('sampled', 'B, G, C_in/G, K, P', sampled),
        Step('columns', 'B, C_in*K, P', columns),
        Step('weight', 'C_out, C_in, kh, kw', weight),
        Step('output', 'B, C_out, H_out, W_out', output),
        Step("output's gradient", 'B, C_out, H_out, W_out', grad_output),
        Step("columns' gradient", 'B, C_in*K, P', grad_columns),
        Step("sampled's gradient", 'B, G, C_in/G, K, P', grad_sampled),
        Step('geometric sensitivity', 'B, G, C_in/G, K, (y, x), P', sensitivity),
        Step("offset's gradient", 'B, 2*G*K, H_out, W_out', grad_offset),
        *grad_modulated,
        Step("input's gradient", 'B, C_in, H, W', _grad_input(layer, input, offset, mask)),
        Step("weight's gradient", 'C_out, C_in, kh, kw', grad_weight),
    ]


def _grad_input(layer: Any, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the gradient of the input with the operator: it scatters each sample's gradient to its four corners."""
    image = input.detach().requires_grad_()
    settings = (layer.stride, layer.padding, layer.dilation)
    with torch.enable_grad():
        output = deform_conv2d(image, offset, layer.weight.detach(), None, *settings, mask)
        (gradient,) = torch.autograd.grad(output.sum(), image)
    return gradient
