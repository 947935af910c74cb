# SPDX-License-Identifier: Apache-2.0
"""What a detector needs around the operators."""

from mmdcn.models.fuse_conv_bn import fuse_conv_bn
from mmdcn.models.resnet import ResNet, ResNetV1d
from mmdcn.models.roi_extractor import SingleRoIExtractor

__all__ = ['ResNet', 'ResNetV1d', 'SingleRoIExtractor', 'fuse_conv_bn']
