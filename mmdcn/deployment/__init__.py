# SPDX-License-Identifier: Apache-2.0
"""Detectors for use without mmdet: exported with torch.export, to ONNX, and compiled by AOTInductor."""

from mmdcn.deployment.detector import Detector, export
from mmdcn.deployment.evaluation import ExportedDetector, distances
from mmdcn.deployment.packages import describe, export_aoti, export_onnx, load

__all__ = ['Detector', 'ExportedDetector', 'describe', 'distances', 'export', 'export_aoti', 'export_onnx', 'load']
