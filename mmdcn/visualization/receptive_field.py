# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field: the pixels that a feature depends on."""

from typing import Any

import torch
from torch import Tensor, nn


def effective_receptive_field(
    model: nn.Module,
    images: Tensor,  # [B, C, H, W]
    layer: str,
    index: tuple[int, int],
) -> Tensor:  # [H, W]
    """Return the gradient of one position of a layer's output with respect to the image (Luo et al., NeurIPS 2016).

    The gradient follows every path, including those through offsets and masks. It is that of the sum over the output's
    channels. Its magnitudes are summed over the channels of the image and averaged over the batch.

    Args:
        model: A network whose only argument is the images, such as a detector's backbone, in evaluation mode.
        images: The input of the network.
        layer: The name of the module whose output [B, C_out, H_out, W_out] is differentiated.
        index: The position (i, j) in this output.

    Raises:
        ValueError: If the model has no such module, or the module is not used or has no such position.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f'layer must name a module of the model, such as {[*modules][-1]!r}, got {layer!r}')
    outputs: list[Any] = []
    handle = modules[layer].register_forward_hook(lambda _, args, output: outputs.append(output))
    images = images.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            model(images)
            if not outputs:
                raise ValueError(f'layer {layer!r} must be used by the model, but it is not')
            size = tuple(outputs[-1].shape[-2:])
            if not all(0 <= i < length for i, length in zip(index, size, strict=True)):
                raise ValueError(f'index must lie in the output of {size[0]} x {size[1]} positions, got {index}')
            (gradient,) = torch.autograd.grad(outputs[-1][:, :, index[0], index[1]].sum(), images)
    finally:
        handle.remove()
    return gradient.abs().sum(1).mean(0)
