# SPDX-License-Identifier: Apache-2.0
"""Detectors for use without mmdet: exported with torch.export, to ONNX, and compiled by AOTInductor."""

from mmdcn.deployment.detector import Detector, export

__all__ = ['Detector', 'export']
