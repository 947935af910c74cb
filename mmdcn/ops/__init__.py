# SPDX-License-Identifier: Apache-2.0
"""The operators as functions: deformable convolution, deformable RoI pooling, non-maximum suppression."""

from mmdcn._extension import load

load()

# These modules register rules for the operators of the core, so the core must be loaded first.
import mmdcn.ops._flops  # noqa: E402, F401
from mmdcn.ops.deform_conv2d import deform_conv2d, pack_weight  # noqa: E402
from mmdcn.ops.deform_roi_pool import deform_roi_pool  # noqa: E402
from mmdcn.ops.nms import nms, nms_match, soft_nms  # noqa: E402

__all__ = ['deform_conv2d', 'deform_roi_pool', 'nms', 'nms_match', 'pack_weight', 'soft_nms']
