# SPDX-License-Identifier: Apache-2.0
"""Deformable layers for any PyTorch model; they need torch alone.

Their arguments, parameters and state-dict keys are those of mmcv's layers of the same names. `mmdcn.modules` registers
the same layers for configs of OpenMMLab.
"""

from mmdcn.nn.deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from mmdcn.nn.deform_roi_pool import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack

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
