# SPDX-License-Identifier: Apache-2.0
"""mmcv's classes, for the ecosystem to recognize mmdcn's layers by; `object` where `mmcv.ops` cannot be imported.

mmengine's `dcn_offset_lr_mult` asks for them, for one. mmcv without its compiled operators has no `mmcv.ops`, and then
nobody can ask.
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
