# SPDX-License-Identifier: Apache-2.0
"""Run on mmdcn what was written for mmcv's deformable convolutions: unchanged configs of mmdet, and its code."""

import sys
from typing import Any

import mmcv.ops
import mmdet.models  # noqa: F401  (so that patch_mmdet finds all of its modules)
import mmengine.registry
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmdcn import ops
from mmdcn.converting import LAYERS, ROI_LAYERS, say
from mmdcn.modules.deform_conv2d import without_autocast
from mmdcn.ops._arguments import overridable

SWITCHES = ('mmdcn.overrides', 'mmdcn.patched')  # whose import is the switch
Sizes = int | tuple[int, int]  # one for both axes, or (y, x)


@overridable
def _deform_conv2d(
    input: Tensor,  # [B, C_in, H, W]
    offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Take the arguments of `mmcv.ops.deform_conv2d`, of unlike types too; groups follow from the shapes.

    TOOD samples its boxes so: float32 boxes, at offsets in autocast's type. They keep their digits, as autocast or
    mmcv's cast to the type of the offsets would not let them.
    """
    dtype = torch.promote_types(input.dtype, offset.dtype)
    input, offset, weight = (tensor.to(dtype) for tensor in (input, offset, weight))
    with without_autocast(input):
        return ops.deform_conv2d(input, offset, weight, None, stride, padding, dilation)


_REPLACEMENTS: dict[Any, Any] = {**LAYERS, mmcv.ops.deform_conv2d: _deform_conv2d}


def override_names() -> None:
    """Let `DCN` and `DCNv2` mean mmdcn's layers in the scope of mmdet, and log it.

    This reaches every config with `default_scope = 'mmdet'`, and the parts of mmdet that name the types themselves:
    FCOS, YOLOX, DDOD, NAS-FCOS and TOOD heads, CenterNet's neck. Other scopes keep mmcv's layers.

    Raises:
        KeyError: If something else has registered one of the names in `mmdet.registry.MODELS`.
    """
    say('On mmdcn now', _override_names())


def patch_mmdet() -> None:
    """Do as `mmdcn.overrides` does, put mmdcn's layers in mmdet's modules in the place of mmcv's, and log it.

    This reaches the heads and necks that import `mmcv.ops`: RepPoints, VFNet, TOOD, FoveaBox, guided anchoring,
    cascade RPN, CentripetalNet, DyHead and GLIP, and DetectoRS through mmcv's SAC; and the RoI layers, which mmdet's
    extractors look up in `mmcv.ops`. It is for what is built afterwards, and for the calls of TOOD and SAC at once; see
    `convert_model` for the layers of a built model.

    Raises:
        KeyError: If something else has registered `DCN` or `DCNv2` in `mmdet.registry.MODELS`.
    """
    say('On mmdcn now', _override_names() + _rebind(_REPLACEMENTS))


def unpatch_mmdet() -> None:
    """Undo `patch_mmdet` and `mmdcn.overrides`, and log it; what was built in between stays on mmdcn.

    A later config that imports `mmdcn.overrides` or `mmdcn.patched` switches on again.
    """
    restored = {ours: theirs for theirs, ours in _REPLACEMENTS.items()}
    say('On mmcv again', _restore_names() + _rebind(restored))
    for name in SWITCHES:
        sys.modules.pop(name, None)


def _names() -> dict[str, type[nn.Module]]:
    """Give mmdcn's layer for each name under which mmcv has registered one of its own."""
    registered = mmengine.registry.MODELS.module_dict.items()
    return {name: LAYERS[layer] for name, layer in registered if layer in LAYERS}


def _override_names() -> list[str]:
    names = {name: layer for name, layer in _names().items() if MODELS.module_dict.get(name) is not layer}
    for name, layer in names.items():
        MODELS.register_module(name, module=layer)
    return [f'mmdet.registry.MODELS: {name}' for name in names]


def _restore_names() -> list[str]:
    names = [name for name, layer in _names().items() if MODELS.module_dict.get(name) is layer]
    for name in names:
        MODELS.module_dict.pop(name)
    return [f'mmdet.registry.MODELS: {name}' for name in names]


def _rebind(replacements: dict[Any, Any]) -> list[str]:
    """Replace objects in the namespaces of mmdet and of mmcv's SAC, and RoI layers in mmcv.ops; tell where."""
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
