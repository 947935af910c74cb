# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression, box by box, in plain Python numbers."""

import math

import torch
from torch import Tensor

Box = list[float]  # x1, y1, x2, y2


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Define mmdcn.ops.nms."""
    corners = boxes.tolist()
    kept: list[int] = []
    for number in scores.argsort(descending=True).tolist():
        if not any(_overlap(corners[better], corners[number], offset) > iou_threshold for better in kept):
            kept.append(number)
    return boxes.new_tensor(kept, dtype=torch.int64)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = 'linear',
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Define mmdcn.ops.soft_nms, except for the order of equal scores."""
    corners, left, kept = boxes.tolist(), dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=lambda number: left[number])
        kept.append((best, left.pop(best)))
        for number in list(left):
            overlap = _overlap(corners[best], corners[number], offset)
            if method == 'gaussian':
                left[number] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= iou_threshold:
                left[number] *= 0 if method == 'naive' else 1 - overlap
            if left[number] < min_score:
                del left[number]
    rows = [[*corners[number], score] for number, score in kept]
    return boxes.new_tensor(rows).reshape(-1, 5), boxes.new_tensor([number for number, _ in kept], dtype=torch.int64)


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[list[int]]:
    """Define mmdcn.ops.nms_match."""
    corners = boxes.tolist()
    groups: list[list[int]] = []
    for number in scores.argsort(descending=True).tolist():
        own = (group for group in groups if _overlap(corners[group[0]], corners[number], 0) >= iou_threshold)
        group = next(own, None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups


def _overlap(a: Box, b: Box, offset: int) -> float:
    """Return the intersection over union; NaN, which exceeds no threshold, if the union has no area."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = sum((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    union = areas - width * height
    return width * height / union if union else math.nan
