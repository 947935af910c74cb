# SPDX-License-Identifier: Apache-2.0
"""Parts of detectors: backbones, RoI extractors, fusion for inference."""

from importlib.util import find_spec

from mmdcn.models.fuse_conv_bn import fuse_conv_bn
from mmdcn.modules._mmcv_layers import MMCV_HAS_OPS

__all__ = ['fuse_conv_bn']

if MMCV_HAS_OPS and find_spec('mmdet') is not None:  # optional; these classes derive from mmdet's
    from mmdcn.models.resnet import ResNet, ResNetV1d
    from mmdcn.models.roi_extractor import SingleRoIExtractor

    __all__ += ['ResNet', 'ResNetV1d', 'SingleRoIExtractor']
