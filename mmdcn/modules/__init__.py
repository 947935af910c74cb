# SPDX-License-Identifier: Apache-2.0
"""The layers that configs name."""

from mmdcn.modules.deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)

__all__ = ['DeformConv2d', 'DeformConv2dPack', 'ModulatedDeformConv2d', 'ModulatedDeformConv2dPack']
