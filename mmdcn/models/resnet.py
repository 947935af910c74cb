# SPDX-License-Identifier: Apache-2.0
"""ResNet with deformable convolutions in any block, at any depth."""

from typing import Any

from mmcv.cnn import build_conv_layer
from mmdet.models.backbones import resnet
from torch import nn

from mmdcn.checkpoints import accept_version1_keys
from mmdcn.registry import MODELS


@MODELS.register_module()
class ResNet(resnet.ResNet):
    """mmdet's ResNet, in which the 3x3 convolution of any block may be deformable, also at depths 18 and 34.

    In a block with two 3x3 convolutions it is the second one, `conv2`, which has no stride. The arguments and the names
    of the parameters are those of `mmdet.ResNet`, but `dcn` and `stage_with_dcn` accept more.

    Args:
        dcn: The deformable layer's config, such as `dict(type='mmdcn.DCNv2', deform_groups=1)`. It is not modified.
            If it contains `fallback_on_stride=True`, the 3x3 convolutions that have a stride stay plain. In the
            `pytorch` style of depths 50, 101 and 152 these are in the first block of a stage.
        stage_with_dcn: One entry per stage: one bool for all of its blocks, or one bool for each of them.

    Raises:
        ValueError: If both `conv_cfg` and `dcn` are given, or an entry of `stage_with_dcn` is neither a bool nor one
            bool for each block.

    Example:
        `ResNet(18, dcn=dict(type='mmdcn.DCN'), stage_with_dcn=(False, False, (False, True), True))` has a deformable
        layer in the second block of the third stage and in both of the fourth.
    """

    def make_res_layer(self, *, dcn: dict[str, Any] | None = None, **kwargs: Any) -> nn.Sequential:
        """Make a stage of plain blocks, then replace the chosen convolutions by deformable layers."""
        stage = super().make_res_layer(**kwargs)
        if dcn is None:
            return stage
        if kwargs['conv_cfg'] is not None:
            raise ValueError(
                f'conv_cfg must be None where dcn is given, got conv_cfg={kwargs["conv_cfg"]}; remove one of them'
            )
        index = len(self.res_layers)  # of this stage; the list contains the earlier ones
        wanted = self.stage_with_dcn[index]
        if not isinstance(wanted, list | tuple):
            wanted = [wanted] * len(stage)
        if len(wanted) != len(stage):
            raise ValueError(
                f'stage_with_dcn[{index}] must be one bool, or one for each of the {len(stage)} blocks of the stage, '
                f'got {wanted}'
            )
        layer = {key: value for key, value in dcn.items() if key != 'fallback_on_stride'}
        for block, deformable in zip(stage, wanted, strict=True):
            strided = max(block.conv2.stride) > 1
            if deformable and not (strided and dcn.get('fallback_on_stride', False)):
                block.conv2 = _build_like(block.conv2, layer)
        accept_version1_keys(stage)
        return stage


@MODELS.register_module()
class ResNetV1d(ResNet, resnet.ResNetV1d):
    """`ResNet` with mmdet's deep stem and average pooling before the downsampling convolutions."""


def _build_like(conv: nn.Conv2d, cfg: dict[str, Any]) -> nn.Module:
    return build_conv_layer(
        cfg,
        conv.in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        bias=False,
    )
