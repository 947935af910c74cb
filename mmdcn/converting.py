# SPDX-License-Identifier: Apache-2.0
"""Turn built models over to mmdcn, of whatever library of OpenMMLab they are."""

import math
from collections import Counter

import mmcv.ops
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdcn import modules
from mmdcn.checkpoints import accept_version1_keys
from mmdcn.modules.predictors import make_predictors
from mmdcn.reference.conv2d import output_shape


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


ROI_LAYERS: dict[type, type[nn.Module]] = {
    mmcv.ops.DeformRoIPool: modules.DeformRoIPool,
    mmcv.ops.DeformRoIPoolPack: modules.DeformRoIPoolPack,
    mmcv.ops.ModulatedDeformRoIPoolPack: modules.ModulatedDeformRoIPoolPack,
}
LAYERS: dict[type, type[nn.Module]] = {
    mmcv.ops.DeformConv2d: modules.DeformConv2d,
    mmcv.ops.DeformConv2dPack: modules.DeformConv2dPack,
    mmcv.ops.ModulatedDeformConv2d: _ModulatedDeformConv2d,
    mmcv.ops.ModulatedDeformConv2dPack: modules.ModulatedDeformConv2dPack,
    **ROI_LAYERS,
}


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
    say('On mmdcn now', [f'{count} {name}' for name, count in converted.items()])
    say('Left as they are, because they may differ from the layers of mmcv that they derive from', left_alone)
    return model


def _convert(module: nn.Module, layer: type[nn.Module]) -> None:
    # The class makes the whole difference: mmdcn's derives from mmcv's, and reads the same attributes, but for the
    # bias that mmcv's DCNv1 never has.
    module.__class__ = layer
    make_predictors(module)
    if isinstance(module, mmcv.ops.DeformConv2d) and not hasattr(module, 'bias'):
        module.register_parameter('bias', None)


def say(what: str, items: list[str]) -> None:
    """Log a list, unless it is empty."""
    if items:
        print_log('\n  '.join([f'{what}:', *items]), logger='current')
