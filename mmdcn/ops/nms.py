# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression of boxes: the functions, and the registration of their operators with torch."""

import torch
from torch import Tensor

from mmdcn._extension import check_device
from mmdcn.ops._arguments import check, check_floating, check_shape

METHODS = ('naive', 'linear', 'gaussian')


def nms(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    iou_threshold: float,
    offset: int = 0,
) -> Tensor:  # [M]
    """Keep each box that overlaps no kept box with a higher score by more than a threshold.

    Args:
        boxes: Corners (x1, y1, x2, y2), in float64, float32, float16 or bfloat16; narrow types are computed in float32.
        scores: The score of each box, in any of these types. Equal scores are in the order in which torch sorts them.
        iou_threshold: Largest intersection over union (IoU) of two boxes that are both kept.
        offset: 1 if a box includes the pixel (x2, y2), as in the first versions of mmdet; else 0.

    Returns:
        The indices of the kept boxes, in int64, the highest score first.

    Raises:
        ValueError: If the rank, shape, type or device of an argument does not fit, or the offset is neither 0 nor 1.
    """
    _check(boxes, scores, offset)
    if boxes.is_cuda:
        check_device(boxes.device)
    return torch.ops.mmdcn.nms(boxes.detach(), scores.detach(), iou_threshold, offset)


def soft_nms(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = 'linear',
    offset: int = 0,
) -> tuple[Tensor, Tensor]:  # [M, 5], [M]
    """Lower the score of each box by its overlap with boxes of higher score (Bodla et al., Soft-NMS, ICCV 2017).

    It runs on the CPU, whatever the device of the boxes.

    Args:
        boxes: As in `nms`.
        scores: As in `nms`.
        iou_threshold: Smallest IoU that lowers a score; the gaussian method ignores it.
        sigma: Width of the gaussian, which multiplies the score by exp(-overlap^2 / sigma).
        min_score: A box whose score falls below this is dropped.
        method: 'naive' multiplies the score by 0, 'linear' by 1 - overlap, 'gaussian' by the factor above.
        offset: As in `nms`.

    Returns:
        The kept boxes with their new scores, in the type of the boxes, the highest score first; and their indices.

    Raises:
        ValueError: As in `nms`, or if the method is unknown.
    """
    _check(boxes, scores, offset)
    check(method in METHODS, lambda: f'method must be one of {", ".join(METHODS)}, got {method!r}')
    settings = (iou_threshold, sigma, min_score, METHODS.index(method), offset)
    dets, indices = torch.ops.mmdcn.soft_nms(boxes.detach().cpu(), scores.detach().cpu(), *settings)
    return dets.to(boxes.device), indices.to(boxes.device)


def nms_match(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    iou_threshold: float,
) -> list[list[int]]:
    """Group each kept box with the boxes that it suppresses, as in PISA (Cao et al., CVPR 2020).

    Unlike in `nms`, an overlap equal to the threshold suppresses. It runs on the CPU, whatever the device of the boxes.

    Args:
        boxes: As in `nms`.
        scores: As in `nms`.
        iou_threshold: Smallest IoU that suppresses a box.

    Returns:
        The groups, as indices of boxes. The highest score comes first, both within a group and among the groups.

    Raises:
        ValueError: As in `nms`.
    """
    _check(boxes, scores, 0)
    scores = scores.detach().cpu()
    keepers = torch.ops.mmdcn.nms_match(boxes.detach().cpu(), scores, iou_threshold).tolist()
    groups: dict[int, list[int]] = {}
    for number in scores.argsort(descending=True).tolist():
        groups.setdefault(keepers[number], []).append(number)
    return list(groups.values())


def _check(boxes: Tensor, scores: Tensor, offset: int) -> None:
    check_floating(boxes, 'boxes', 2, '[N, 4]')
    check_floating(scores, 'scores', 1, '[N]')
    check_shape(boxes, 'boxes', '[N, 4], (x1, y1, x2, y2)', boxes.shape[0], 4)
    check_shape(scores, 'scores', '[N]', boxes.shape[0])
    check(
        scores.device == boxes.device,
        lambda: f'scores must be on the device of boxes, {boxes.device}, got {scores.device}',
    )
    check(offset in (0, 1), lambda: f'offset must be 0 or 1, got {offset}')


@torch.library.register_fake('mmdcn::nms')
def _fake_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    _check(boxes, scores, offset)
    return boxes.new_empty(_any_size(), dtype=torch.int64)


@torch.library.register_fake('mmdcn::soft_nms')
def _fake_soft_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, method: int, offset: int
) -> tuple[Tensor, Tensor]:
    _check(boxes, scores, offset)
    size = _any_size()
    return boxes.new_empty(size, 5), boxes.new_empty(size, dtype=torch.int64)


@torch.library.register_fake('mmdcn::nms_match')
def _fake_nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    _check(boxes, scores, 0)
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _any_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()
