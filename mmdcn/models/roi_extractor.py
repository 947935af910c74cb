# SPDX-License-Identifier: Apache-2.0
"""mmdet's RoI extractor, with RoI layers from mmdcn's registry."""

from typing import Any

import mmcv.ops
from mmdet.models import roi_heads
from torch import nn

from mmdcn.registry import MODELS


@MODELS.register_module()
class SingleRoIExtractor(roi_heads.SingleRoIExtractor):
    """mmdet's SingleRoIExtractor, which also finds mmdcn's RoI layers by name.

    The arguments are mmdet's. mmdet's extractor looks up the `type` of `roi_layer` in `mmcv.ops`, not in a registry.
    This one looks in mmdcn's registry first: `DeformRoIPoolPack` and `mmdcn.DeformRoIPoolPack` are mmdcn's, `RoIAlign`
    is mmcv's.
    """

    def build_roi_layers(self, layer_cfg: dict[str, Any], featmap_strides: list[int]) -> nn.ModuleList:
        """Build one layer per feature level; `featmap_strides` are the levels' strides in pixels of the image.

        Raises:
            ValueError: If neither the registry nor mmcv.ops has the type.
        """
        layer = layer_cfg['type']
        if isinstance(layer, str):
            layer = MODELS.get(layer) or getattr(mmcv.ops, layer, None)
        if layer is None:
            raise ValueError(
                f"the type of roi_layer must be in mmdcn's registry or in mmcv.ops, got {layer_cfg['type']!r}"
            )
        return super().build_roi_layers(dict(layer_cfg, type=layer), featmap_strides)
