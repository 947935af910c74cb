# SPDX-License-Identifier: Apache-2.0
"""Replace `DCN` and `DCNv2` in mmdet's registry."""

import mmengine.registry
from mmdet.registry import MODELS
from torch import nn

from mmdcn.openmmlab.counterparts import LAYERS


def override_names() -> list[str]:
    """Register mmdcn's layers in mmdet's registry under mmcv's names, and return what was registered.

    Raises:
        KeyError: If something else has registered one of the names in `mmdet.registry.MODELS`.
    """
    names = {name: layer for name, layer in _layers_by_name().items() if MODELS.module_dict.get(name) is not layer}
    for name, layer in names.items():
        MODELS.register_module(name, module=layer)
    return [f'mmdet.registry.MODELS: {name}' for name in names]


def restore_names() -> list[str]:
    """Undo `override_names`, and return what was removed."""
    names = [name for name, layer in _layers_by_name().items() if MODELS.module_dict.get(name) is layer]
    for name in names:
        MODELS.module_dict.pop(name)
    return [f'mmdet.registry.MODELS: {name}' for name in names]


def _layers_by_name() -> dict[str, type[nn.Module]]:
    """Return mmdcn's layer for each name under which mmcv has registered one of its layers."""
    registered = mmengine.registry.MODELS.module_dict.items()
    return {name: LAYERS[layer] for name, layer in registered if layer in LAYERS}
