# SPDX-License-Identifier: Apache-2.0
"""What the deformable layers of a model are called with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdcn.reference.deform_conv2d import regular_places


@dataclass
class Sampling:
    """One call of a deformable layer: where it samples the B maps that it takes."""

    name: str  # of the layer in the model
    input: Tensor  # [B, C, H, W]
    regular: Tensor  # [K, 2, H_out, W_out], (y, x) in pixels of the input: where a convolution samples
    offset: Tensor  # [B, G, K, 2, H_out, W_out], (y, x) in pixels of the input
    mask: Tensor | None  # [B, G, K, H_out, W_out]


@contextmanager
def watched(model: nn.Module, saw: Callable[[nn.Module, Sampling], None]) -> Iterator[None]:
    """Tell of every call of a deformable layer of a model, before the layer samples.

    Args:
        model: A model with layers of mmdcn or of mmcv, packed ones or those that take offsets from outside.
        saw: Takes the layer and its sampling, which is detached and in float32.
    """
    handles = []
    for name, layer in model.named_modules():
        if not hasattr(layer, 'deform_groups') or not hasattr(layer, 'kernel_size'):
            continue
        if hasattr(layer, 'conv_offset'):
            handles.append(layer.conv_offset.register_forward_hook(_packed(name, layer, saw)))
        else:
            handles.append(layer.register_forward_pre_hook(_unpacked(name, layer, saw), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _packed(name: str, layer: Any, saw: Callable) -> Callable:
    def hook(conv: nn.Module, args: tuple, output: Tensor) -> None:
        taps = layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
        mask = output[:, 2 * taps :].detach().float().sigmoid() if output.shape[1] == 3 * taps else None
        saw(layer, _sampling(name, layer, args[0], output[:, : 2 * taps], mask))

    return hook


def _unpacked(name: str, layer: Any, saw: Callable) -> Callable:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given: dict[str, Any] = dict(zip(('x', 'offset', 'mask'), args, strict=False)) | kwargs
        saw(layer, _sampling(name, layer, given['x'], given['offset'], given.get('mask')))

    return hook


def _sampling(name: str, layer: Any, input: Tensor, offset: Tensor, mask: Tensor | None) -> Sampling:
    size = (offset.shape[2], offset.shape[3])
    groups, taps = layer.deform_groups, layer.kernel_size[0] * layer.kernel_size[1]
    kernel = torch.Size(layer.kernel_size)
    regular = torch.stack(
        regular_places(kernel, size, layer.stride, layer.padding, layer.dilation, offset.detach().float()), dim=1
    )
    return Sampling(
        name,
        input,
        regular.view(taps, 2, *size),
        offset.detach().float().reshape(-1, groups, taps, 2, *size),
        None if mask is None else mask.detach().float().reshape(-1, groups, taps, *size),
    )
