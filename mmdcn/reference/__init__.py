# SPDX-License-Identifier: Apache-2.0
"""Definitions of the operators in plain PyTorch.

They are slow and simple: for tests, for reading, and for rare derivatives.
"""

from mmdcn.reference import conv2d
from mmdcn.reference.deform_conv2d import deform_conv2d, deform_conv2d_backward
from mmdcn.reference.deform_roi_pool import deform_roi_pool, deform_roi_pool_backward
from mmdcn.reference.nms import nms, nms_match, soft_nms

__all__ = [
    'conv2d',
    'deform_conv2d',
    'deform_conv2d_backward',
    'deform_roi_pool',
    'deform_roi_pool_backward',
    'nms',
    'nms_match',
    'soft_nms',
]
