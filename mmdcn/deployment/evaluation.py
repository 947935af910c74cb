# SPDX-License-Identifier: Apache-2.0
"""Run exported detectors in MMEngine's test loop, and compare their detections with those of other detectors."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdcn.deployment.packages import Detections


class ExportedDetector(nn.Module):
    """An exported detector as a model for MMEngine's test loop and its evaluators.

    Args:
        data_preprocessor: The `data_preprocessor` of the original detector.
        detect: The exported detector, as `mmdcn.deployment.load` returns it.
    """

    def __init__(self, data_preprocessor: nn.Module, detect: Callable[[Tensor, Tensor], Detections]) -> None:
        super().__init__()
        self.data_preprocessor, self.detect = data_preprocessor, detect

    def test_step(self, data: dict[str, Any]) -> list[DetDataSample]:
        """Detect objects in a batch of the data loader; boxes are in pixels of the original images."""
        data = self.data_preprocessor(data, False)
        samples = data['data_samples']
        sizes = torch.tensor([sample.img_shape[:2] for sample in samples])
        for sample, boxes, scores, labels in zip(samples, *self.detect(data['inputs'], sizes), strict=True):
            found = labels >= 0
            scale = boxes.new_tensor(sample.scale_factor).repeat(2)
            sample.pred_instances = InstanceData(
                bboxes=boxes[found] / scale, scores=scores[found], labels=labels[found]
            )
        return samples


def distances(first: InstanceData, second: InstanceData) -> Tensor:
    """Measure the distances between the detections of two detectors on one image.

    Args:
        first: N detections, with `bboxes`, `scores` and `labels`.
        second: M detections.

    Returns:
        The distance of each detection, [N + M], to the nearest detection of the other detector with the same label.
        The distance is the largest difference of a coordinate, in pixels, or of the scores. It is infinite if the
        other detector has no detection with this label.
    """
    rows, columns = (torch.cat([found.bboxes, found.scores[:, None]], dim=1) for found in (first, second))
    apart = torch.cdist(rows, columns, p=torch.inf)
    apart = F.pad(apart.masked_fill(first.labels[:, None] != second.labels, torch.inf), (0, 1, 0, 1), value=torch.inf)
    return torch.cat([apart.amin(1)[:-1], apart.amin(0)[:-1]])
