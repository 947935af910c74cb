# SPDX-License-Identifier: Apache-2.0
"""The layers of `mmdcn.nn`, registered for configs."""

import mmdcn.modules.complexity  # noqa: F401  (so that mmengine counts what the layers compute)
from mmdcn import nn
from mmdcn.modules.deform_conv2d import DeformConv2d as DeformConv2d
from mmdcn.modules.deform_conv2d import DeformConv2dPack as DeformConv2dPack
from mmdcn.modules.deform_conv2d import ModulatedDeformConv2d as ModulatedDeformConv2d
from mmdcn.modules.deform_conv2d import ModulatedDeformConv2dPack as ModulatedDeformConv2dPack
from mmdcn.modules.deform_roi_pool import DeformRoIPool as DeformRoIPool
from mmdcn.modules.deform_roi_pool import DeformRoIPoolPack as DeformRoIPoolPack
from mmdcn.modules.deform_roi_pool import ModulatedDeformRoIPoolPack as ModulatedDeformRoIPoolPack

DCN = DeformConv2dPack
DCNv2 = ModulatedDCN = ModulatedDeformConv2dPack

__all__ = nn.__all__
