# SPDX-License-Identifier: Apache-2.0
"""ResNet with deformable convolutions at any depth."""

from typing import Any, ClassVar

from mmcv.cnn import build_conv_layer
from mmdet.models.backbones import resnet

from mmdcn.registry import MODELS


class BasicBlock(resnet.BasicBlock):
    """mmdet's BasicBlock, whose second 3x3 convolution, the one without a stride, may be deformable."""

    def __init__(self, inplanes: int, planes: int, *args: Any, dcn: dict | None = None, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        if dcn is not None:
            layer = {key: value for key, value in dcn.items() if key != 'fallback_on_stride'}
            self.conv2 = build_conv_layer(layer, planes, planes, kernel_size=3, padding=1, bias=False)


@MODELS.register_module()
class ResNet(resnet.ResNet):
    """mmdet's ResNet, which takes `dcn` and `stage_with_dcn` at depths 18 and 34 too.

    The arguments and the parameters' names are those of `mmdet.ResNet`.
    """

    arch_settings: ClassVar[dict] = {
        depth: (BasicBlock if block is resnet.BasicBlock else block, stage_blocks)
        for depth, (block, stage_blocks) in resnet.ResNet.arch_settings.items()
    }
