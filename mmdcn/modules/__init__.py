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

__all__ = [
    'DeformConv2d',
    'DeformConv2dPack',
    'DeformRoIPool',
    'DeformRoIPoolPack',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
    'ModulatedDeformRoIPoolPack',
]
