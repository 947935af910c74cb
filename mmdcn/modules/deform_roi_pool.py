# SPDX-License-Identifier: Apache-2.0
"""The deformable RoI pooling of `mmdcn.nn`, registered for configs, as subclasses of mmcv's layers."""

from mmdcn import nn
from mmdcn.modules import _mmcv_layers as mmcv
from mmdcn.registry import MODELS


@MODELS.register_module()
class DeformRoIPool(nn.DeformRoIPool, mmcv.DeformRoIPool):
    """`mmdcn.nn.DeformRoIPool`, for configs."""


@MODELS.register_module()
class DeformRoIPoolPack(nn.DeformRoIPoolPack, DeformRoIPool, mmcv.DeformRoIPoolPack):
    """`mmdcn.nn.DeformRoIPoolPack`, for configs."""


@MODELS.register_module()
class ModulatedDeformRoIPoolPack(nn.ModulatedDeformRoIPoolPack, DeformRoIPool, mmcv.ModulatedDeformRoIPoolPack):
    """`mmdcn.nn.ModulatedDeformRoIPoolPack`, for configs."""
