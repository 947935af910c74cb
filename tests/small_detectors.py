# SPDX-License-Identifier: Apache-2.0
"""Detectors and a batch that are as small as they can be."""

from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn

LEVELS = dict(in_channels=[8, 16, 32], out_channels=8, num_outs=3)


def backbone(layer: str | None = 'mmdcn.DCNv2', **settings: Any) -> dict:
    """Configure a ResNet-18 of three stages, an eighth of the usual width and deformable in c3 and c4.

    Its residual branches are not zero at first, so that the layers count.
    """
    return dict(
        type='mmdcn.ResNet', depth=18, base_channels=8, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
        out_indices=(0, 1, 2), norm_eval=False, zero_init_residual=False, dcn=layer and dict(type=layer),
        stage_with_dcn=(False, True, True), **settings,
    )  # fmt: skip


def build(cfg: dict) -> nn.Module:
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def fcos_config(**settings: Any) -> dict:
    """Configure a detector of one stage, whose head has batch normalization; settings go to the backbone."""
    return dict(
        type='FCOS',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=16),
        backbone=backbone(**settings),
        neck=dict(type='FPN', **LEVELS),
        bbox_head=dict(
            type='FCOSHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1, strides=(4, 8, 16),
            regress_ranges=((-1, 16), (16, 32), (32, 1e8)), norm_cfg=dict(type='BN'),
        ),
        test_cfg=dict(nms_pre=50, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
    )  # fmt: skip


def faster_rcnn_config(**settings: Any) -> dict:
    """Configure a detector of two stages; settings go to the backbone."""
    path = Path(__file__).parents[1] / 'configs/_base_/models/faster-rcnn_r18-w32_fpn.py'
    cfg = Config.fromfile(path).model
    cfg.backbone = backbone(**settings)
    cfg.neck.update(LEVELS)
    cfg.rpn_head.update(in_channels=8, feat_channels=8)
    cfg.rpn_head.anchor_generator.strides = [4, 8, 16]
    cfg.roi_head.bbox_roi_extractor.update(out_channels=8, featmap_strides=[4, 8, 16])
    cfg.roi_head.bbox_head.update(in_channels=8, fc_out_channels=8, num_classes=3)
    return cfg


def sample() -> DetDataSample:
    """Two boxes in an image of 48 x 80 pixels."""
    size = (48, 80)
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, batch_input_shape=size, scale_factor=(1, 1)))
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [30.0, 10.0, 75.0, 44.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
    return sample


def images() -> list[Tensor]:
    """Two images, as the data loader gives them."""
    return list(255 * torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)))


def batch() -> dict:
    """Both images, with their boxes."""
    return dict(inputs=images(), data_samples=[sample(), sample()])
