# SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling as layers: mmcv's arguments, parameters and types, on mmdcn's operator.

Each layer is an instance of mmcv's class of the same name, as the convolutions are.
"""

import mmcv.ops
from torch import Tensor

from mmdcn.modules.predictors import Packed
from mmdcn.modules.tracing import OneNode
from mmdcn.ops import deform_roi_pool
from mmdcn.registry import MODELS


@MODELS.register_module()
class DeformRoIPool(OneNode, mmcv.ops.DeformRoIPool):
    """Deformable RoI pooling with offsets from outside.

    The arguments are those of `mmcv.ops.DeformRoIPool`: output_size, spatial_scale, sampling_ratio and gamma.
    """

    def forward(
        self,
        input: Tensor,  # [B, C, H, W]
        rois: Tensor,  # [N, 5]
        offset: Tensor | None = None,  # [N, 2, ph, pw]
    ) -> Tensor:  # [N, C, ph, pw]
        """Apply `mmdcn.ops.deform_roi_pool`."""
        return deform_roi_pool(
            input, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma
        )


@MODELS.register_module()
class DeformRoIPoolPack(Packed, DeformRoIPool, mmcv.ops.DeformRoIPoolPack):
    """Deformable RoI pooling that predicts its offsets from the regions, pooled without (Dai et al., ICCV 2017, 2.2).

    The arguments and parameters are those of `mmcv.ops.DeformRoIPoolPack`. The offsets are zero at first, so that the
    layer begins as RoIAlign.
    """

    def forward(  # type: ignore[override]  # as mmcv's: a packed layer takes no offsets
        self,
        input: Tensor,  # [B, C, H, W]
        rois: Tensor,  # [N, 5]
    ) -> Tensor:  # [N, C, ph, pw]
        """Predict the offsets, and pool with them."""
        return _pool(self, input, rois, _pool_without_offsets(self, input, rois))


@MODELS.register_module()
class ModulatedDeformRoIPoolPack(Packed, DeformRoIPool, mmcv.ops.ModulatedDeformRoIPoolPack):
    """Deformable RoI pooling that predicts its offsets, and a mask for each bin (Zhu et al., CVPR 2019, 3.2).

    The arguments and parameters are those of `mmcv.ops.ModulatedDeformRoIPoolPack`. Offsets start at 0 and masks at
    0.5.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # [B, C, H, W]
        rois: Tensor,  # [N, 5]
    ) -> Tensor:  # [N, C, ph, pw]
        """Predict the offsets and masks, and pool with them."""
        bins = _pool_without_offsets(self, input, rois)
        mask = self.mask_fc(bins).unflatten(1, (1, *self.output_size))
        return _pool(self, input, rois, bins) * mask


def _pool_without_offsets(layer: DeformRoIPool, input: Tensor, rois: Tensor) -> Tensor:  # [N, C * ph * pw]
    """Give what a packed layer predicts its offsets from."""
    channels = layer.output_channels
    if input.dim() == 4 and input.shape[1] != channels:  # the operator tells of another rank
        raise ValueError(
            f'input must have {channels} channels, the output_channels of the layer, got shape {list(input.shape)}'
        )
    return DeformRoIPool.forward(layer, input, rois).flatten(1)


def _pool(layer: DeformRoIPool, input: Tensor, rois: Tensor, bins: Tensor) -> Tensor:  # [N, C, ph, pw]
    """Pool with the offsets that the layer predicts from the bins."""
    offset = layer.offset_fc(bins).unflatten(1, (2, *layer.output_size))
    return DeformRoIPool.forward(layer, input, rois, offset)
