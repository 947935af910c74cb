# SPDX-License-Identifier: Apache-2.0
"""Run unchanged configs and code of mmdet, written for mmcv's deformable convolutions, on mmdcn."""

import sys

from mmdcn.openmmlab import imported_names, registered_names
from mmdcn.openmmlab.log_changes import log_changes

SWITCHES = ('mmdcn.overrides', 'mmdcn.overrides_everywhere', 'mmdcn.patched')  # modules that switch when imported


def override_names() -> None:
    """Make `DCN` and `DCNv2` refer to mmdcn's layers in the scope of mmdet, and log it.

    This affects every config with `default_scope = 'mmdet'`, and the parts of mmdet that name these types themselves:
    the heads of FCOS, YOLOX, DDOD, NAS-FCOS and TOOD, and CenterNet's neck. Other scopes keep mmcv's layers.

    Raises:
        KeyError: If something else has registered one of the names in `mmdet.registry.MODELS`.
    """
    log_changes('Switched to mmdcn', registered_names.override_names())


def patch_mmdet() -> None:
    """Do what `mmdcn.overrides` does, replace mmcv's layers in mmdet's modules with mmdcn's, and log it.

    This affects the heads and necks that import `mmcv.ops`: RepPoints, VFNet, TOOD, FoveaBox, guided anchoring,
    cascade RPN, CentripetalNet, DyHead and GLIP, and DetectoRS through mmcv's SAC. It also affects the RoI layers,
    which mmdet's extractors look up in `mmcv.ops`. Layers that are already built stay as they are, see
    `convert_model`; the functions that TOOD and SAC call are replaced at once.

    Raises:
        KeyError: If something else has registered `DCN` or `DCNv2` in `mmdet.registry.MODELS`.
    """
    log_changes('Switched to mmdcn', registered_names.override_names() + imported_names.rebind_to_mmdcn())


def unpatch_mmdet() -> None:
    """Undo `patch_mmdet` and `mmdcn.overrides`, and log it; models built in between stay on mmdcn.

    A later config that imports `mmdcn.overrides` or `mmdcn.overrides_everywhere` switches to mmdcn again.
    """
    log_changes('Switched back to mmcv', registered_names.restore_names() + imported_names.rebind_to_mmcv())
    for name in SWITCHES:
        sys.modules.pop(name, None)
