# SPDX-License-Identifier: Apache-2.0
"""Predictors of offsets and masks: convolutions and linear layers whose parameters are zero until they are trained.

Note: [Offsets start at zero]
The parameters of a predictor are zero after construction. Then OpenMMLab's `init_weights` draws the weights of a whole
model: by class name (`init_cfg=dict(layer='Conv2d')`) or for all modules (`override`), both through `apply`; or in a
loop over `modules()` or `parameters()`. A layer can neither prevent nor undo this, since no container of torch passes
`init_weights` on to it. Therefore a predictor hides from every search for modules while a function of the name
`init_weights` runs, whatever class it belongs to. Access by name, `layer.conv_offset`, and checkpoints work as usual.
What else such a function does to all parameters, such as to freeze them, does not reach a predictor either.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmdcn._private_hooks import is_within


class Predictor(nn.Module):
    """A layer whose parameters stay as they are when the model around it is initialized."""

    def reset_parameters(self) -> None:
        """Set the parameters to zero."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layer with its name, or nothing during an initialization."""
        return iter(()) if is_within('init_weights') else super().named_modules(*args, **kwargs)

    def apply(self, fn: Callable[[nn.Module], Any]) -> 'Predictor':
        """Apply a function to the layer, except during an initialization."""
        return self if is_within('init_weights') else super().apply(fn)


class ConvPredictor(Predictor, nn.Conv2d):
    """A convolution that predicts offsets, and perhaps masks; its parameters start at zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C_in, H, W], on CUDA with padded channels."""
        plain = self.groups == 1 and self.padding_mode == 'zeros'
        if not (x.is_cuda and plain):
            return super().forward(x)
        return conv2d_with_padded_channels(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


def conv2d_with_padded_channels(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Convolve with a multiple of 8 output channels, which tensor cores need. cuDNN pads 27 channels more slowly."""
    channels = weight.shape[0]
    missing = -channels % 8
    if missing:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        bias = None if bias is None else F.pad(bias, (0, missing))
    return F.conv2d(x, weight, bias, *geometry).narrow(-3, 0, channels)


class LinearPredictor(Predictor, nn.Linear):
    """A linear layer that predicts offsets or masks; its parameters start at zero."""


_CLASSES: dict[type, type[Predictor]] = {nn.Conv2d: ConvPredictor, nn.Linear: LinearPredictor}


def make_predictors(layer: Any) -> list[Predictor]:
    """Turn the torch layers that compute a layer's offsets and masks into predictors, and return them.

    They stay the same objects and keep their parameters; only their class changes.
    """
    parts = [getattr(layer, name) for name in ('conv_offset', 'offset_fc', 'mask_fc') if hasattr(layer, name)]
    plain = [[module for module in part.modules() if type(module) in _CLASSES] for part in parts]
    predictors = [modules[-1] for modules in plain if modules]  # empty if another package has replaced them
    for predictor in predictors:
        predictor.__class__ = _CLASSES[type(predictor)]
    return predictors
