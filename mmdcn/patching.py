# SPDX-License-Identifier: Apache-2.0
"""Run on mmdcn what was written for mmcv's deformable convolutions: unchanged configs, mmdet's code, built models."""

import math
import sys
from collections import Counter
from typing import Any

import mmcv.ops
import mmdet.models  # noqa: F401  (so that patch_mmdet finds all of its modules)
import mmengine.registry
import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdcn import modules, ops
from mmdcn.checkpoints import accept_version1_keys
from mmdcn.modules.deform_conv2d import without_autocast
from mmdcn.modules.predictors import make_predictors
from mmdcn.ops._arguments import overridable
from mmdcn.reference.conv2d import output_shape

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


class _ModulatedDeformConv2d(modules.ModulatedDeformConv2d):
    """Take offsets and masks for more positions than the output has, as mmcv's layer does.

    DyHead and GLIP give the features of a coarser level the offsets and masks of a finer one. mmcv then takes the
    first numbers of each image, row by row, for those of a smaller map; weights trained so need them so.
    """

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        offset: Tensor,  # [B, 2*G*K, >= H_out, >= W_out]
        mask: Tensor,  # [B, G*K, >= H_out, >= W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        size = output_shape(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        return super().forward(x, _first(offset, size), _first(mask, size))


def _first(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:].numel() <= math.prod(size):
        return maps  # right, or for the operator to refuse
    count = maps.shape[1] * math.prod(size)
    return maps.flatten(1)[:, :count].unflatten(1, (maps.shape[1], *size))


_ROI_LAYERS: dict[type, type[nn.Module]] = {
    mmcv.ops.DeformRoIPool: modules.DeformRoIPool,
    mmcv.ops.DeformRoIPoolPack: modules.DeformRoIPoolPack,
    mmcv.ops.ModulatedDeformRoIPoolPack: modules.ModulatedDeformRoIPoolPack,
}
_LAYERS: dict[type, type[nn.Module]] = {
    mmcv.ops.DeformConv2d: modules.DeformConv2d,
    mmcv.ops.DeformConv2dPack: modules.DeformConv2dPack,
    mmcv.ops.ModulatedDeformConv2d: _ModulatedDeformConv2d,
    mmcv.ops.ModulatedDeformConv2dPack: modules.ModulatedDeformConv2dPack,
    **_ROI_LAYERS,
}
_REPLACEMENTS: dict[Any, Any] = {**_LAYERS, mmcv.ops.deform_conv2d: _deform_conv2d}


def override_names() -> None:
    """Let `DCN` and `DCNv2` mean mmdcn's layers in the scope of mmdet, and log it.

    This reaches every config with `default_scope = 'mmdet'`, and the parts of mmdet that name the types themselves:
    FCOS, YOLOX, DDOD, NAS-FCOS and TOOD heads, CenterNet's neck. Other scopes keep mmcv's layers.

    Raises:
        KeyError: If something else has registered one of the names in `mmdet.registry.MODELS`.
    """
    _say('On mmdcn now', _override_names())


def patch_mmdet() -> None:
    """Do as `mmdcn.overrides` does, put mmdcn's layers in mmdet's modules in the place of mmcv's, and log it.

    This reaches the heads and necks that import `mmcv.ops`: RepPoints, VFNet, TOOD, FoveaBox, guided anchoring,
    cascade RPN, CentripetalNet, DyHead and GLIP, and DetectoRS through mmcv's SAC; and the RoI layers, which mmdet's
    extractors look up in `mmcv.ops`. It is for what is built afterwards, and for the calls of TOOD and SAC at once; see
    `convert_model` for the layers of a built model.

    Raises:
        KeyError: If something else has registered `DCN` or `DCNv2` in `mmdet.registry.MODELS`.
    """
    _say('On mmdcn now', _override_names() + _rebind(_REPLACEMENTS))


def unpatch_mmdet() -> None:
    """Undo `patch_mmdet` and `mmdcn.overrides`, and log it; what was built in between stays on mmdcn."""
    restored = {ours: theirs for theirs, ours in _REPLACEMENTS.items()}
    _say('On mmcv again', _restore_names() + _rebind(restored))


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
        layer = _LAYERS.get(type(module))
        if layer is not None:
            converted[type(module).__name__] += 1
            _convert(module, layer)
        elif isinstance(module, tuple(_LAYERS)) and not isinstance(module, tuple(_LAYERS.values())):
            left_alone.append(f'{name or "the model"}: {type(module).__module__}.{type(module).__qualname__}')
    accept_version1_keys(model)
    _say('On mmdcn now', [f'{count} {name}' for name, count in converted.items()])
    _say('Left as they are, because they may differ from the layers of mmcv that they derive from', left_alone)
    return model


def _convert(module: nn.Module, layer: type[nn.Module]) -> None:
    # The class makes the whole difference: mmdcn's derives from mmcv's, and reads the same attributes, but for the
    # bias that mmcv's DCNv1 never has.
    module.__class__ = layer
    make_predictors(module)
    if isinstance(module, mmcv.ops.DeformConv2d) and not hasattr(module, 'bias'):
        module.register_parameter('bias', None)


def _names() -> dict[str, type[nn.Module]]:
    """Give mmdcn's layer for each name under which mmcv has registered one of its own."""
    registered = mmengine.registry.MODELS.module_dict.items()
    return {name: _LAYERS[layer] for name, layer in registered if layer in _LAYERS}


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
    roi_layers = {*_ROI_LAYERS, *_ROI_LAYERS.values()}
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


def _say(what: str, items: list[str]) -> None:
    if items:
        print_log('\n  '.join([f'{what}:', *items]), logger='current')
