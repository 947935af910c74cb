# SPDX-License-Identifier: Apache-2.0
"""mmdcn's replacement for each deformable layer and function of mmcv."""

from typing import Any

import mmcv.ops
import torch
from torch import Tensor, nn

from mmdcn import modules, ops
from mmdcn.openmmlab.finer_maps import first_values
from mmdcn.ops._arguments import overridable
from mmdcn.ops._autocast import without_autocast
from mmdcn.reference.geometry import output_shape

Sizes = int | tuple[int, int]  # one for both axes, or (y, x)


class _ModulatedDeformConv2d(modules.ModulatedDeformConv2d):
    """Accept offsets and masks for more positions than the output has, as mmcv's layer does."""

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        offset: Tensor,  # [B, 2*G*K, >= H_out, >= W_out]
        mask: Tensor,  # [B, G*K, >= H_out, >= W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        size = output_shape(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        return super().forward(x, first_values(offset, size), first_values(mask, size))


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
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Accept the arguments of `mmcv.ops.deform_conv2d`, also in mixed dtypes; the shapes determine the groups.

    As in mmcv there is no bias; `im2col_step` has no effect.

    TOOD samples float32 boxes at offsets in autocast's dtype. Promoting all tensors keeps the precision of the boxes;
    autocast, or mmcv's cast to the dtype of the offsets, would lose it.
    """
    dtype = torch.promote_types(input.dtype, offset.dtype)
    input, offset, weight = (tensor.to(dtype) for tensor in (input, offset, weight))
    with without_autocast(input):
        return ops.deform_conv2d(input, offset, weight, None, stride, padding, dilation)


FUNCTIONS: dict[Any, Any] = {mmcv.ops.deform_conv2d: _deform_conv2d}
