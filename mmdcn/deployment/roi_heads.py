# SPDX-License-Identifier: Apache-2.0
"""The predictions of the box heads of two-stage detectors, for a fixed number of regions."""

from collections.abc import Sequence
from typing import Any

import mmcv.ops
import torch
from mmdet.models import roi_heads
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import Tensor

from mmdcn import modules, ops
from mmdcn.deployment.dense_heads import clip
from mmdcn.deployment.nms import NONE, Candidates

_HEADS = (roi_heads.StandardRoIHead, roi_heads.CascadeRoIHead)
_METHODS = ('predict_bbox', '_bbox_forward')  # methods that `candidates` replaces


def check_head(head: Any) -> None:
    """Check that the boxes of an RoI head can be exported.

    Raises:
        NotImplementedError: If they cannot be exported.
    """
    if not any(all(getattr(type(head), name) is getattr(known, name) for name in _METHODS) for known in _HEADS):
        names = ' and '.join(known.__name__ for known in _HEADS)
        raise NotImplementedError(
            f'the predictions of {type(head).__name__} cannot be exported; those of {names}, and of heads that '
            'inherit them, can'
        )
    for extractor, box_head in _stages(head):
        if type(extractor).forward is not roi_heads.SingleRoIExtractor.forward:
            raise NotImplementedError(f'{type(extractor).__name__} cannot be exported; SingleRoIExtractor can')
        for layer in extractor.roi_layers:
            if not isinstance(layer, modules.DeformRoIPool) and not _is_aligned_mean(layer):
                raise NotImplementedError(
                    f'{layer} cannot be exported; mmdcn.DeformRoIPool and its packs can, and mmcv.ops.RoIAlign with '
                    "aligned=True and pool_mode='avg'"
                )
        predict = getattr(type(box_head), '_predict_by_feat_single', None)
        if predict is not BBoxHead._predict_by_feat_single or not box_head.with_reg or box_head.custom_activation:
            raise NotImplementedError(
                f'the predictions of {type(box_head).__name__} cannot be exported; those of BBoxHead, and of heads '
                'that inherit them, can, with boxes and without Seesaw loss'
            )


def candidates(head: Any, features: Sequence[Tensor], proposals: Candidates, sizes: Tensor) -> Candidates:
    """Return the boxes of an RoI head before non-maximum suppression.

    Args:
        head: The head, with one stage or a cascade of stages.
        features: The feature maps, [B, C, H, W] each.
        proposals: The regions, R per image.
        sizes: Height and width of each image, [B, 2], to which the boxes are clipped.

    Returns:
        The boxes, one per region and class. Their groups are the labels.
    """
    batch, count = proposals.scores.shape
    boxes, total = proposals.boxes, torch.zeros(())
    stages = _stages(head)
    for number, (extractor, box_head) in enumerate(stages):
        logits, deltas = box_head(_features(head, extractor, features, boxes))
        total = total + logits
        if number < len(stages) - 1:
            labels = logits[:, :-1].argmax(1)
            boxes = box_head.regress_by_class(boxes.flatten(0, 1), labels, deltas, dict(img_shape=None))
            boxes = _clip(box_head, boxes.unflatten(0, (batch, count)), sizes)
    classes = 1 if box_head.reg_class_agnostic else box_head.num_classes
    regions = boxes.flatten(0, 1).repeat_interleave(classes, dim=0)
    boxes = box_head.bbox_coder.decode(regions, deltas.reshape(-1, 4), max_shape=None)
    boxes = _clip(box_head, boxes.unflatten(0, (batch, count * classes)), sizes)
    boxes = boxes.unflatten(1, (count, classes)).expand(-1, -1, box_head.num_classes, -1)
    scores = (total / len(stages)).softmax(-1)[:, :-1].unflatten(0, (batch, count))
    wanted = (scores > head.test_cfg.score_thr) & (proposals.scores > NONE)[..., None]
    labels = torch.arange(box_head.num_classes, device=scores.device).expand_as(scores)
    return Candidates(boxes.flatten(1, 2), scores.masked_fill(~wanted, NONE).flatten(1), labels.flatten(1))


def _stages(head: Any) -> list[tuple[Any, Any]]:
    """Return the RoI extractor and the box head of each stage."""
    if isinstance(head, roi_heads.CascadeRoIHead):
        return list(zip(head.bbox_roi_extractor, head.bbox_head, strict=True))
    return [(head.bbox_roi_extractor, head.bbox_head)]


def _clip(box_head: Any, boxes: Tensor, sizes: Tensor) -> Tensor:
    return clip(boxes, sizes) if box_head.bbox_coder.clip_border else boxes


def _features(head: Any, extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tensor:  # [B * R, C, ph, pw]
    """Pool each region from the feature map that suits its size."""
    images = torch.arange(boxes.shape[0], device=boxes.device).to(boxes).expand(boxes.shape[1], -1).T
    rois = torch.cat([images[..., None], boxes], dim=2).flatten(0, 1)
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    pooled = features[0].new_zeros(rois.shape[0], extractor.out_channels, *extractor.roi_layers[0].output_size)
    for level, (layer, maps) in enumerate(zip(extractor.roi_layers, features, strict=False)):
        index = (levels == level).nonzero().squeeze(1)
        pooled = pooled.index_put((index,), _pool(layer, maps, rois[index]))
    return head.shared_head(pooled) if head.with_shared_head else pooled


def _pool(layer: Any, maps: Tensor, rois: Tensor) -> Tensor:
    if isinstance(layer, modules.DeformRoIPool):
        return layer(maps, rois)
    return ops.deform_roi_pool(maps, rois, None, layer.output_size, layer.spatial_scale, layer.sampling_ratio)


def _is_aligned_mean(layer: Any) -> bool:
    return type(layer) is mmcv.ops.RoIAlign and layer.aligned and layer.pool_mode == 'avg'
