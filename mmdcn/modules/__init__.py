# SPDX-License-Identifier: Apache-2.0
"""The layers that configs name."""

import mmdcn.modules.complexity  # noqa: F401  (so that mmengine counts what the layers compute)
from mmdcn.modules.deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from mmdcn.modules.deform_roi_pool import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack

DCN = DeformConv2dPack
DCNv2 = ModulatedDCN = ModulatedDeformConv2dPack

__all__ = [
    'DCN',
    'DCNv2',
    'DeformConv2d',
    'DeformConv2dPack',
    'DeformRoIPool',
    'DeformRoIPoolPack',
    'ModulatedDCN',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
    'ModulatedDeformRoIPoolPack',
]
