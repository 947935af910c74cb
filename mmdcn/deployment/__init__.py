# SPDX-License-Identifier: Apache-2.0
"""Export detectors for use without mmdet: with torch.export, to ONNX, or compiled by AOTInductor."""

from mmdcn.deployment.detector import Detector, export
from mmdcn.deployment.evaluation import ExportedDetector, distances
from mmdcn.deployment.packages import describe, export_aoti, export_onnx, load

__all__ = ['Detector', 'ExportedDetector', 'describe', 'distances', 'export', 'export_aoti', 'export_onnx', 'load']
