# SPDX-License-Identifier: Apache-2.0
"""mmcv's classes, by which other packages recognize mmdcn's layers; `object` if `mmcv.ops` cannot be imported.

mmengine's `dcn_offset_lr_mult`, for example, checks for these classes. mmcv without compiled operators has no
`mmcv.ops`, so no code can check for them.
"""

try:
    from mmcv.ops import (
        DeformConv2d,
        DeformConv2dPack,
        DeformRoIPool,
        DeformRoIPoolPack,
        ModulatedDeformConv2d,
        ModulatedDeformConv2dPack,
        ModulatedDeformRoIPoolPack,
    )

    MMCV_HAS_OPS = True
except ImportError:
    MMCV_HAS_OPS = False
    DeformConv2d = DeformConv2dPack = ModulatedDeformConv2d = ModulatedDeformConv2dPack = object
    DeformRoIPool = DeformRoIPoolPack = ModulatedDeformRoIPoolPack = object

__all__ = [
    'MMCV_HAS_OPS',
    'DeformConv2d',
    'DeformConv2dPack',
    'DeformRoIPool',
    'DeformRoIPoolPack',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
    'ModulatedDeformRoIPoolPack',
]
