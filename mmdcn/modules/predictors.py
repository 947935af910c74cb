# SPDX-License-Identifier: Apache-2.0
"""What predicts offsets and masks: convolutions and linear layers that are zero until they learn something else.

Note: [Offsets start at zero]
A layer is right from its construction on. Then mmengine initializes the model: a parent draws the weights of all
convolutions below it (`init_cfg=dict(layer='Conv2d')`), or of all modules (`override`), and a head those that it finds
by isinstance. A layer cannot undo that, since no container of torch calls its `init_weights`. But mmengine gives every
module `_params_init_info` while it initializes, and takes it away at the end. A predictor keeps its parameters then:
what has changed them is undone, unless it was the layer itself, or a checkpoint.
"""

from typing import Any

import torch
from torch import nn

_DURING = '_params_init_info'


class Predictor(nn.Module):
    """Has parameters that an initialization of what surrounds it leaves as they are."""

    def reset_parameters(self) -> None:
        """Set the parameters to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self._keep()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _DURING:
            self._keep()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == _DURING:
            with torch.no_grad():
                for parameter, kept in zip(self.parameters(), self.__dict__.pop('_kept'), strict=True):
                    parameter.copy_(kept)

    def _keep(self) -> None:
        if hasattr(self, _DURING):
            self._kept = [parameter.detach().clone() for parameter in self.parameters()]


class ConvPredictor(Predictor, nn.Conv2d):
    """A convolution as any other, but for its initialization."""


class LinearPredictor(Predictor, nn.Linear):
    """A linear layer as any other, but for its initialization."""


_CLASSES: dict[type, type[Predictor]] = {nn.Conv2d: ConvPredictor, nn.Linear: LinearPredictor}


def make_predictors(layer: Any) -> list[Predictor]:
    """Make predictors of those layers of torch that the offsets and masks of a layer come from, and give them.

    They stay the very same objects, with the parameters that they have.
    """
    parts = [getattr(layer, name) for name in ('conv_offset', 'offset_fc', 'mask_fc') if hasattr(layer, name)]
    predictors = [[module for module in part.modules() if type(module) in _CLASSES][-1] for part in parts]
    for predictor in predictors:
        predictor.__class__ = _CLASSES[type(predictor)]
    return predictors


class Packed:
    """A layer that predicts its offsets itself; it is the first base of such a layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for predictor in make_predictors(self):
            predictor.reset_parameters()
