# SPDX-License-Identifier: Apache-2.0
"""What a detector needs around the operators."""

from mmdcn.models.resnet import ResNet

__all__ = ['ResNet']
