# SPDX-License-Identifier: Apache-2.0
"""Select candidates by score and non-maximum suppression, with shapes that do not depend on the data."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmdcn.ops  # noqa: F401  (loads the core)

NONE = -1.0  # the score of an empty entry, which holds no candidate


class Candidates(NamedTuple):
    """Boxes of a batch of images, the same number for each image; an entry with the score `NONE` is empty."""

    boxes: Tensor  # [B, N, 4], (x1, y1, x2, y2)
    scores: Tensor  # [B, N]
    groups: Tensor  # [B, N]; a box suppresses only boxes of its own group

    def take(self, scores: Tensor, index: Tensor) -> 'Candidates':  # both [B, K]
        """Select candidates by their indices, and give them new scores."""
        boxes = self.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return Candidates(boxes, scores, self.groups.gather(1, index))


@torch.library.register_fake('mmdcn::nms_mask')
def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` best scores of each image, and their indices.

    Args:
        scores: The scores, [B, N].
        count: The number of scores to return. It may be larger than N.

    Returns:
        The scores in descending order, and their indices, both [B, count]. Missing scores are `NONE`, with an
        arbitrary index.
    """
    padded = F.pad(scores, (0, count), value=NONE)
    top, index = padded.topk(count)
    return top, index.clamp(max=scores.shape[1] - 1)


def suppress(candidates: Candidates, nms: Mapping[str, Any], count: int) -> Candidates:
    """Suppress the same boxes as `mmcv.ops.batched_nms`, and keep the best `count` candidates of each image.

    Args:
        candidates: The candidates.
        nms: The config, such as `dict(type='nms', iou_threshold=0.5)`.
        count: The number of candidates to keep. Images with fewer candidates get empty entries.
    """
    boxes = candidates.boxes
    if not nms.get('class_agnostic', False):
        # As in mmcv, each group is shifted apart from the others: the shift rounds the boxes, and results must match.
        present = (candidates.scores > NONE)[..., None]
        step = torch.where(present, boxes, 0).amax((1, 2), keepdim=True) + 1
        boxes = boxes + candidates.groups[..., None] * step
    kept = torch.ops.mmdcn.nms_mask(boxes, candidates.scores, float(nms['iou_threshold']), NONE)
    return candidates.take(*best(candidates.scores.masked_fill(~kept, NONE), count))


def check_test_cfg(cfg: Mapping[str, Any], place: str, *counts: str) -> None:
    """Check that `suppress` supports the suppression of a `test_cfg`, and that the number of boxes is limited.

    Args:
        cfg: The config.
        place: The name of the config, for the message.
        counts: The keys that must be positive.

    Raises:
        ValueError: If the suppression is not supported, or one of the keys is not positive.
    """
    nms = cfg.get('nms')
    known = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
    if nms is None or nms.get('type', 'nms') != 'nms' or 'iou_threshold' not in nms or nms.keys() - known:
        raise ValueError(
            f"{place}.nms must be dict(type='nms', iou_threshold=…), optionally with class_agnostic, to be exported, "
            f'got {nms}'
        )
    for key in counts:
        if cfg.get(key, -1) <= 0:
            raise ValueError(f'{place}.{key} must be positive to be exported, got {cfg.get(key)}')
