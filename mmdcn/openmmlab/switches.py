# SPDX-License-Identifier: Apache-2.0
"""Run on mmdcn what was written for mmcv's deformable convolutions: unchanged configs of mmdet, and its code."""

import sys

from mmdcn.openmmlab import imported_names, registered_names
from mmdcn.openmmlab.log_changes import log_changes

SWITCHES = ('mmdcn.overrides', 'mmdcn.overrides_everywhere', 'mmdcn.patched')  # whose import is the switch


def override_names() -> None:
    """Let `DCN` and `DCNv2` mean mmdcn's layers in the scope of mmdet, and log it.

    This reaches every config with `default_scope = 'mmdet'`, and the parts of mmdet that name the types themselves:
    FCOS, YOLOX, DDOD, NAS-FCOS and TOOD heads, CenterNet's neck. Other scopes keep mmcv's layers.

    Raises:
        KeyError: If something else has registered one of the names in `mmdet.registry.MODELS`.
    """
    log_changes('On mmdcn now', registered_names.override_names())


def patch_mmdet() -> None:
    """Do as `mmdcn.overrides` does, put mmdcn's layers in mmdet's modules in the place of mmcv's, and log it.

    This reaches the heads and necks that import `mmcv.ops`: RepPoints, VFNet, TOOD, FoveaBox, guided anchoring,
    cascade RPN, CentripetalNet, DyHead and GLIP, and DetectoRS through mmcv's SAC; and the RoI layers, which mmdet's
    extractors look up in `mmcv.ops`. It is for what is built afterwards, and for the calls of TOOD and SAC at once; see
    `convert_model` for the layers of a built model.

    Raises:
        KeyError: If something else has registered `DCN` or `DCNv2` in `mmdet.registry.MODELS`.
    """
    log_changes('On mmdcn now', registered_names.override_names() + imported_names.rebind_to_mmdcn())


def unpatch_mmdet() -> None:
    """Undo `patch_mmdet` and `mmdcn.overrides`, and log it; what was built in between stays on mmdcn.

    A later config that imports `mmdcn.overrides` or `mmdcn.overrides_everywhere` switches on again.
    """
    log_changes('On mmcv again', registered_names.restore_names() + imported_names.rebind_to_mmcv())
    for name in SWITCHES:
        sys.modules.pop(name, None)
