# SPDX-License-Identifier: Apache-2.0
"""Convert the layers of built models of any OpenMMLab library to mmdcn's."""

from collections import Counter

import mmcv.ops
from torch import nn

from mmdcn.checkpoints import accept_version1_keys
from mmdcn.nn._predictors import make_predictors
from mmdcn.openmmlab.counterparts import LAYERS
from mmdcn.openmmlab.log_changes import log_changes


def convert_model(model: nn.Module) -> nn.Module:
    """Convert each of mmcv's deformable layers in a built model to mmdcn's, and log it.

    Modules and parameters stay the same objects, so optimizers, hooks and wrappers around the model remain valid.
    Checkpoints of mmdet 1 can be loaded. Other packages' subclasses of mmcv's layers are left unchanged and named in
    the log. TOOD and SAC call functions instead of layers: use `patch_mmdet` for those.

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
    log_changes('Switched to mmdcn', [f'{count} {name}' for name, count in converted.items()])
    log_changes('Left unchanged, because they may differ from the mmcv layers that they derive from', left_alone)
    return model


def _convert(module: nn.Module, layer: type[nn.Module]) -> None:
    # Replacing the class is enough: mmdcn's class derives from mmcv's and reads the same attributes, except the bias,
    # which mmcv's DCNv1 lacks.
    module.__class__ = layer
    make_predictors(module)
    if isinstance(module, mmcv.ops.DeformConv2d) and not hasattr(module, 'bias'):
        module.register_parameter('bias', None)
