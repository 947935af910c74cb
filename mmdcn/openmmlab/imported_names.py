# SPDX-License-Identifier: Apache-2.0
"""Replace the names that mmdet's heads and necks, and mmcv's SAC, have imported from `mmcv.ops`."""

import sys
from typing import Any

import mmdet.models  # noqa: F401  (so that `_rebind` finds all of its modules)

from mmdcn.openmmlab.counterparts import FUNCTIONS, LAYERS, ROI_LAYERS

_COUNTERPARTS: dict[Any, Any] = {**LAYERS, **FUNCTIONS}


def rebind_to_mmdcn() -> list[str]:
    """Replace mmcv's layers and functions with mmdcn's, and return the names that changed."""
    return _rebind(_COUNTERPARTS)


def rebind_to_mmcv() -> list[str]:
    """Undo `rebind_to_mmdcn`, and return the names that changed."""
    return _rebind({ours: theirs for theirs, ours in _COUNTERPARTS.items()})


def _rebind(replacements: dict[Any, Any]) -> list[str]:
    """Replace objects in the namespaces of mmdet and of mmcv's SAC, and RoI layers in mmcv.ops."""
    roi_layers = {*ROI_LAYERS, *ROI_LAYERS.values()}
    places = [
        (module, name, new)
        for module_name, module in sys.modules.items()
        if module_name.startswith('mmdet.') or module_name in ('mmcv.ops', 'mmcv.ops.saconv')
        for name, value in vars(module).items()
        for old, new in replacements.items()
        if value is old and (module_name != 'mmcv.ops' or old in roi_layers)
    ]
    for module, name, new in places:
        setattr(module, name, new)
    return [f'{module.__name__}: {name}' for module, name, _ in places]
