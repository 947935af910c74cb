# SPDX-License-Identifier: Apache-2.0
"""Hooks that observe the inputs, offsets and masks of a model's deformable layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdcn.reference.deform_conv2d import regular_places


@dataclass
class Sampling:
    """One call of a deformable layer: its B input maps, and where it samples them."""

    name: str  # of the layer in the model
    input: Tensor  # [B, C, H, W]
    regular: Tensor  # [K, 2, H_out, W_out], (y, x) in pixels of the input, without offsets
    offset: Tensor  # [B, G, K, 2, H_out, W_out], (y, x) in pixels of the input
    mask: Tensor | None  # [B, G, K, H_out, W_out]


@contextmanager
def watched(model: nn.Module, saw: Callable[[nn.Module, Sampling], None]) -> Iterator[None]:
    """Report every call of a model's deformable layers to a function, before the layer samples.

    Args:
        model: A model with layers of mmdcn or of mmcv. They may be packed, or take their offsets as an argument.
        saw: The function. It is called with the layer and its sampling, whose offsets and masks are detached and in
            float32.
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


def _packed(name: str, layer: Any, saw: Callable[[nn.Module, Sampling], None]) -> Callable[..., None]:
    def hook(conv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        taps = layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
        mask = output[:, 2 * taps :].detach().float().sigmoid() if output.shape[1] == 3 * taps else None
        saw(layer, _sampling(name, layer, args[0], output[:, : 2 * taps], mask))

    return hook


def _unpacked(name: str, layer: Any, saw: Callable[[nn.Module, Sampling], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
