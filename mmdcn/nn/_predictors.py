# SPDX-License-Identifier: Apache-2.0
"""What predicts offsets and masks: convolutions and linear layers that are zero until they learn something else.

Note: [Offsets start at zero]
A layer is right from its construction on. Then OpenMMLab's `init_weights` draws the weights of a model: by the names of
classes (`init_cfg=dict(layer='Conv2d')`) or of all modules (`override`), both by `apply`; or by a loop over `modules()`
or `parameters()`. A layer can neither forbid nor undo that, since no container of torch passes `init_weights` on to it.
So a predictor hides from all who look for modules while a function of that name runs, whosever it is. It is found by
its name, `layer.conv_offset`, and loads checkpoints, as ever.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from mmdcn._private_hooks import is_within


class Predictor(nn.Module):
    """Has parameters that an initialization of what surrounds it leaves as they are."""

    def reset_parameters(self) -> None:
        """Set the parameters to zero."""
        for parameter in self._parameters.values():
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield itself by its name; nothing during an initialization."""
        return iter(()) if is_within('init_weights') else super().named_modules(*args, **kwargs)

    def apply(self, fn: Callable[[nn.Module], Any]) -> 'Predictor':
        """Apply a function to itself, but for an initialization."""
        return self if is_within('init_weights') else super().apply(fn)


class ConvPredictor(Predictor, nn.Conv2d):
    """A convolution as any other, but for its initialization."""


class LinearPredictor(Predictor, nn.Linear):
    """A linear layer as any other, but for its initialization."""


_CLASSES: dict[type, type[Predictor]] = {nn.Conv2d: ConvPredictor, nn.Linear: LinearPredictor}


def make_predictors(layer: Any) -> list[Predictor]:
    """Make predictors of those layers of torch that the offsets and masks of a layer come from, and return them.

    They stay the very same objects, with the parameters that they have.
    """
    parts = [getattr(layer, name) for name in ('conv_offset', 'offset_fc', 'mask_fc') if hasattr(layer, name)]
    plain = [[module for module in part.modules() if type(module) in _CLASSES] for part in parts]
    predictors = [modules[-1] for modules in plain if modules]  # none, where another package has put its own
    for predictor in predictors:
        predictor.__class__ = _CLASSES[type(predictor)]
    return predictors
