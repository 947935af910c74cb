# SPDX-License-Identifier: Apache-2.0
"""Built models: their layers become mmdcn's, of whatever library of OpenMMLab the models are."""

from collections import Counter

import mmcv.ops
from torch import nn

from mmdcn.checkpoints import accept_version1_keys
from mmdcn.nn._predictors import make_predictors
from mmdcn.openmmlab.counterparts import LAYERS
from mmdcn.openmmlab.log_changes import log_changes


def convert_model(model: nn.Module) -> nn.Module:
    """Turn every deformable layer of mmcv's in a built model into mmdcn's, and log it.

    The modules and parameters stay the very same objects, so optimizers, hooks and wrappers around the model remain
    valid, and checkpoints of mmdet 1 load. A subclass of mmcv's layers by another package is left alone, and named in
    the log. The functions that TOOD and SAC call are no layers: `patch_mmdet` reaches those.

    Args:
        model: A model, wrapped or not, or a layer.

    Returns:
        The model itself.
    """
    converted: Counter[str] = Counter()
    left_alone = []
    for name, module in model.named_modules():
        layer = LAYERS.get(type(module))
        if layer is not None:
            converted[type(module).__name__] += 1
            _convert(module, layer)
        elif isinstance(module, tuple(LAYERS)) and not isinstance(module, tuple(LAYERS.values())):
            left_alone.append(f'{name or "the model"}: {type(module).__module__}.{type(module).__qualname__}')
    accept_version1_keys(model)
    log_changes('On mmdcn now', [f'{count} {name}' for name, count in converted.items()])
    log_changes('Left as they are, because they may differ from the layers of mmcv that they derive from', left_alone)
    return model


def _convert(module: nn.Module, layer: type[nn.Module]) -> None:
    # The class makes the whole difference: mmdcn's derives from mmcv's, and reads the same attributes, but for the
    # bias that mmcv's DCNv1 never has.
    module.__class__ = layer
    make_predictors(module)
    if isinstance(module, mmcv.ops.DeformConv2d) and not hasattr(module, 'bias'):
        module.register_parameter('bias', None)
