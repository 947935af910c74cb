# SPDX-License-Identifier: Apache-2.0
"""An mmdet detector as one traceable module from images to detections, and its export."""

from copy import deepcopy
from typing import Any

import torch
from mmdet.models import detectors
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmdcn.deployment import dense_heads, roi_heads
from mmdcn.deployment.nms import NONE, Candidates, check_test_cfg, suppress
from mmdcn.openmmlab.convert_model import convert_model


class Detector(nn.Module):
    """A detector of mmdet whose output shapes do not depend on the data; the detections are those of `predict`.

    It shares the modules of the detector and copies none. Masks are not predicted: a Mask R-CNN gives only its boxes.

    Args:
        model: The detector in evaluation mode, either one-stage or two-stage with an RPN.

    Raises:
        NotImplementedError: If the detector, or a part of it, predicts in a way that cannot be exported.
        ValueError: If its `test_cfg` sets a suppression other than `nms`, or does not limit the number of boxes.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        predict = type(model).predict
        if predict is detectors.SingleStageDetector.predict:
            dense_heads.check_head(model.bbox_head)
            check_test_cfg(model.bbox_head.test_cfg, 'test_cfg', 'nms_pre', 'max_per_img')
        elif predict is detectors.TwoStageDetector.predict:
            dense_heads.check_head(model.rpn_head)
            check_test_cfg(model.rpn_head.test_cfg, 'test_cfg.rpn', 'max_per_img')
            roi_heads.check_head(model.roi_head)
            check_test_cfg(model.roi_head.test_cfg, 'test_cfg.rcnn', 'max_per_img')
        else:
            raise NotImplementedError(
                f'{type(model).__name__} cannot be exported; detectors whose `predict` is that of '
                'SingleStageDetector or TwoStageDetector can'
            )
        self.model = model

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
        sizes: Tensor,  # [B, 2]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, K, 4], [B, K], [B, K]
        """Detect objects.

        Args:
            images: The images, normalized and padded as by the detector's `data_preprocessor`.
            sizes: Height and width of each image before padding, int64. Boxes are clipped to this size.

        Returns:
            The boxes, (x1, y1, x2, y2) in pixels of `images`, their scores and their labels, in descending order of
            score. K is `max_per_img` of `test_cfg`. Missing detections have zeros as box and score, and label -1.
        """
        features = self.model.extract_feat(images)
        if isinstance(self.model, detectors.TwoStageDetector):
            cfg = self.model.rpn_head.test_cfg
            proposals = suppress(dense_heads.candidates(self.model.rpn_head, features, sizes), cfg.nms, cfg.max_per_img)
            head = self.model.roi_head
            found = roi_heads.candidates(head, features, proposals, sizes)
        else:
            head = self.model.bbox_head
            found = dense_heads.candidates(head, features, sizes)
        return _fill(suppress(found, head.test_cfg.nms, head.test_cfg.max_per_img))


def _fill(found: Candidates) -> tuple[Tensor, Tensor, Tensor]:
    empty = found.scores == NONE
    boxes, scores = found.boxes.masked_fill(empty[..., None], 0), found.scores.masked_fill(empty, 0)
    return boxes, scores, found.groups.masked_fill(empty, -1)


def export(model: nn.Module, size: tuple[int, int] = (800, 1344)) -> ExportedProgram:
    """Export a detector with `torch.export`.

    Args:
        model: A detector of mmdet. It is not modified.
        size: Height and width of the traced example, multiples of the detector's `pad_size_divisor`.

    Returns:
        The program of `Detector.forward`, for any number of images and any size that the detector takes.

    Raises:
        NotImplementedError: If the detector, or a part of it, predicts in a way that cannot be exported.
        ValueError: If its `test_cfg` sets a suppression other than `nms`, or does not limit the number of boxes.
    """
    detector = Detector(convert_model(deepcopy(model)).eval().requires_grad_(False))
    parameter = next(detector.parameters())
    images = torch.zeros(2, 3, *size, dtype=parameter.dtype, device=parameter.device)
    sizes = torch.tensor([size, size], device=parameter.device)
    dynamic = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO})
    with torch.no_grad():
        return torch.export.export(detector, (images, sizes), dynamic_shapes=dynamic)
