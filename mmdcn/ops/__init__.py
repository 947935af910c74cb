# SPDX-License-Identifier: Apache-2.0
"""The operators."""

from mmdcn._extension import load

load()

from mmdcn.ops.deform_conv2d import deform_conv2d  # noqa: E402  (its registrations need the core)

__all__ = ['deform_conv2d']
