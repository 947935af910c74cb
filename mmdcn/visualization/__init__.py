# SPDX-License-Identifier: Apache-2.0
"""Tools to look inside."""

from mmdcn.visualization.sampling_points import SamplingRecorder

__all__ = ['SamplingRecorder']
