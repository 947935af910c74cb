# SPDX-License-Identifier: Apache-2.0
"""The deformable convolutions of `mmdcn.nn`, registered for configs, as subclasses of mmcv's layers."""

from mmdcn import nn
from mmdcn.modules import _mmcv_layers as mmcv
from mmdcn.registry import MODELS


@MODELS.register_module()
class DeformConv2d(nn.DeformConv2d, mmcv.DeformConv2d):
    """`mmdcn.nn.DeformConv2d`, for configs."""


@MODELS.register_module(name=['DCN', 'DeformConv2dPack'])
class DeformConv2dPack(nn.DeformConv2dPack, DeformConv2d, mmcv.DeformConv2dPack):
    """`mmdcn.nn.DeformConv2dPack`, for configs."""


@MODELS.register_module()
class ModulatedDeformConv2d(nn.ModulatedDeformConv2d, mmcv.ModulatedDeformConv2d):
    """`mmdcn.nn.ModulatedDeformConv2d`, for configs."""


@MODELS.register_module(name=['DCNv2', 'ModulatedDCN', 'ModulatedDeformConv2dPack'])
class ModulatedDeformConv2dPack(nn.ModulatedDeformConv2dPack, ModulatedDeformConv2d, mmcv.ModulatedDeformConv2dPack):
    """`mmdcn.nn.ModulatedDeformConv2dPack`, for configs."""
