# SPDX-License-Identifier: Apache-2.0
"""The predictions of mmdet's dense heads (one-stage heads and RPN) as a fixed number of candidates."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from mmdet.models import dense_heads
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor

from mmdcn.deployment.nms import NONE, Candidates, best

Decode = Callable[[Any, int, Tensor, Tensor], Tensor]  # (head, level, priors [N, 2 or 4], predictions) to boxes [N, 4]


def _decode(head: Any, level: int, priors: Tensor, predicted: Tensor) -> Tensor:
    return head.bbox_coder.decode(priors, predicted, max_shape=None)


def _decode_gfl(head: Any, level: int, priors: Tensor, predicted: Tensor) -> Tensor:
    distances = head.integral(predicted) * head.prior_generator.strides[level][0]
    return head.bbox_coder.decode(head.anchor_center(priors), distances, max_shape=None)


def _decode_reppoints(head: Any, level: int, priors: Tensor, predicted: Tensor) -> Tensor:
    return head._bbox_decode(priors, predicted, head.point_strides[level], (inf, inf))


# The decoder for each method of mmdet that decodes the predictions of one image.
_DECODERS: dict[Callable[..., Any], Decode] = {
    BaseDenseHead._predict_by_feat_single: _decode,
    dense_heads.RPNHead._predict_by_feat_single: _decode,
    dense_heads.GFLHead._predict_by_feat_single: _decode_gfl,
    dense_heads.RepPointsHead._predict_by_feat_single: _decode_reppoints,
}

_METHODS = ('predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')  # methods that this module replaces


def check_head(head: Any) -> None:
    """Check that the predictions of a head can be exported.

    Raises:
        NotImplementedError: If they cannot be exported.
    """
    methods = {name: getattr(type(head), name, None) for name in _METHODS}
    known_methods = (
        methods['predict_by_feat'] is BaseDenseHead.predict_by_feat
        and methods['_predict_by_feat_single'] in _DECODERS
        and methods['_bbox_post_process'] in (BaseDenseHead._bbox_post_process, dense_heads.RPNHead._bbox_post_process)
    )
    if not known_methods or getattr(head.loss_cls, 'custom_cls_channels', False):
        known = ', '.join(method.__qualname__.split('.')[0] for method in _DECODERS)
        raise NotImplementedError(
            f'the predictions of {type(head).__name__} cannot be exported; those of {known}, and of heads that '
            'inherit them, can'
        )


def candidates(head: Any, features: Sequence[Tensor], sizes: Tensor) -> Candidates:
    """Return the boxes of a head before non-maximum suppression.

    Args:
        head: The head.
        features: Its input feature maps, [B, C, H, W] each.
        sizes: Height and width of each image, [B, 2], to which the boxes are clipped.

    Returns:
        The boxes, at most `nms_pre` per level. Their groups are the labels, or for an RPN the levels.
    """
    outputs = head(features)
    priors = head.prior_generator.grid_priors([maps.shape[2:] for maps in outputs[0]], device=sizes.device)
    levels = [_of_level(head, level, priors[level], *maps) for level, maps in enumerate(zip(*outputs, strict=True))]
    boxes, scores, groups = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    if getattr(getattr(head, 'bbox_coder', None), 'clip_border', True):
        boxes = clip(boxes, sizes)
    return Candidates(boxes, _drop_small(scores, boxes, head.test_cfg.get('min_bbox_size', -1)), groups)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [B, N, 4] to their images, given the heights and widths [B, 2]."""
    limits = sizes.flip(1).repeat(1, 2)[:, None].to(boxes)
    return torch.minimum(boxes.clamp(min=0), limits)


def _of_level(
    head: Any, level: int, priors: Tensor, classes: Tensor, predicted: Tensor, factor: Tensor | None = None
) -> Candidates:
    is_rpn = isinstance(head, dense_heads.RPNHead)
    scores = _scores(head, classes)
    count = scores.shape[-1]  # the number of classes
    if not is_rpn:
        scores = scores.masked_fill(scores <= head.test_cfg.get('score_thr', 0), NONE)
    if is_rpn and head.test_cfg.get('nms_pre', -1) <= 0:
        scores, index = (
            scores.flatten(1),
            torch.arange(priors.shape[0], device=scores.device).expand(scores.shape[0], -1),
        )
    else:
        scores, index = best(scores.flatten(1), head.test_cfg.nms_pre)
    place = index // count
    predicted = predicted.permute(0, 2, 3, 1).reshape(predicted.shape[0], priors.shape[0], -1)
    predicted = predicted.gather(1, place[..., None].expand(-1, -1, predicted.shape[2]))
    boxes = _DECODERS[type(head)._predict_by_feat_single](
        head, level, priors[place.flatten()], predicted.flatten(0, 1)
    ).unflatten(0, place.shape)
    if factor is not None:
        factor = factor.permute(0, 2, 3, 1).flatten(1).sigmoid().gather(1, place)
        scores = torch.where(scores > NONE, scores * factor, NONE)
    return Candidates(boxes, scores, torch.full_like(index, level) if is_rpn else index % count)


def _scores(head: Any, classes: Tensor) -> Tensor:  # [B, N, classes]
    classes = classes.permute(0, 2, 3, 1).reshape(classes.shape[0], -1, head.cls_out_channels)
    return classes.sigmoid() if head.use_sigmoid_cls else classes.softmax(-1)[..., :-1]


def _drop_small(scores: Tensor, boxes: Tensor, least: float) -> Tensor:
    if least < 0:
        return scores
    large = (boxes[..., 2:] - boxes[..., :2] > least).all(-1)
    return scores.masked_fill(~large, NONE)
