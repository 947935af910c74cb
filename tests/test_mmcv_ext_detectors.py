# SPDX-License-Identifier: Apache-2.0
"""mmdet's own detectors on mmdcn.openmmlab.mmcv_ext: they detect and learn as on mmcv's compiled operators."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from small_detectors import build
from torch import Tensor, nn

from mmdcn.openmmlab import mmcv_ext

pytestmark = pytest.mark.mmcv_ops

DETECTORS = {
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Faster R-CNN with deformable RoI pooling': 'dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py',
    'Faster R-CNN, DCN': 'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'FCOS, DCN in its head': 'fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'ATSS, DyHead': 'dyhead/atss_r50-caffe_fpn_dyhead_1x_coco.py',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'YOLOX': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'CenterNet': 'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py',
}
ON_CUDA_ALONE = ['Faster R-CNN with deformable RoI pooling']  # by mmcv
SIZE = (96, 160)  # the smallest whose last level mmcv's DCN takes
SMALL = dict(num_classes=3, score_thr=0.0, nms_pre=100, max_per_img=30, batch_augments=None)


def shrink(value: Any) -> Any:
    """Leave fewer classes and boxes, no random augmentation, and nothing to download."""
    if isinstance(value, dict):
        kept = {key: SMALL.get(key, shrink(each)) for key, each in value.items() if key != 'pretrained'}
        return ConfigDict({key: None if _downloads(key, each) else each for key, each in kept.items()})
    return [shrink(each) for each in value] if isinstance(value, list | tuple) else value


def _downloads(key: str, value: Any) -> bool:
    return key == 'init_cfg' and isinstance(value, dict) and 'checkpoint' in value


def detector(name: str) -> nn.Module:
    model = build(shrink(get_config(f'mmdet::{DETECTORS[name]}').model))
    torch.manual_seed(0)
    for head in (module for module in model.modules() if type(module).__name__.endswith('Head')):
        for parameter in head.parameters():
            if parameter.dim() > 1:  # else all scores are about the same
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    return model


def run_on(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all of mmcv's operators call a module's functions."""
    for name, user in list(sys.modules.items()):
        if name.startswith('mmcv.ops.') and hasattr(user, 'ext_module'):
            monkeypatch.setattr(user, 'ext_module', module)


def discs(boxes: Tensor) -> np.ndarray:  # [N, H, W]
    """Draw the ellipse in each box."""
    y, x = torch.meshgrid(*(torch.arange(size) + 0.5 for size in SIZE), indexing='ij')
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    places = (torch.stack([x, y], 2) - middle[:, None, None]) / half[:, None, None]
    return (places.square().sum(3) < 1).byte().numpy()


def batch(masks: bool = False) -> dict:
    """Two images, with two objects each."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        meta = dict(img_shape=SIZE, ori_shape=SIZE, batch_input_shape=SIZE, scale_factor=(1, 1), border=(0, 96, 0, 160))
        boxes = torch.tensor([[8.0, 12.0, 60.0, 80.0], [60.0, 20.0, 150.0, 88.0]])
        objects = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
        if masks:
            objects.masks = BitmapMasks(discs(boxes), *SIZE)
        samples.append(DetDataSample(metainfo=meta, gt_instances=objects))
    return dict(inputs=list(255 * torch.rand(2, 3, *SIZE, generator=generator)), data_samples=samples)


def detections(model: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        results = model.eval().test_step(batch())
    return [dict(result.pred_instances.items()) for result in results]


def losses_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)  # of samplers
    has_masks = 'mask_head' in dict(getattr(model, 'roi_head', nn.Module()).named_children())
    data = model.train().data_preprocessor(batch(has_masks), True)
    losses, values = model.parse_losses(model(**data, mode='loss'))
    model.zero_grad()
    losses.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: torch.as_tensor(value).detach() for name, value in values.items()} | gradients


@pytest.mark.parametrize('name', sorted({*DETECTORS} - {*ON_CUDA_ALONE}))
def test_a_detector_finds_the_same_on_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector(name)
    expected = detections(model)
    assert any(len(result['scores']) for result in expected)
    run_on(mmcv_ext, monkeypatch)
    for ours, theirs in zip(detections(model), expected, strict=True):
        assert torch.equal(ours['labels'], theirs['labels'])
        torch.testing.assert_close(ours['scores'], theirs['scores'], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours['bboxes'], theirs['bboxes'], rtol=1e-4, atol=1e-3)
        if 'masks' in theirs:
            assert (ours['masks'] != theirs['masks']).float().mean() < 1e-3


@pytest.mark.parametrize('name', sorted({*DETECTORS} - {*ON_CUDA_ALONE}))
def test_a_detector_learns_the_same_on_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector(name)
    expected = losses_and_gradients(model)
    run_on(mmcv_ext, monkeypatch)
    actual = losses_and_gradients(model)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = 2e-3 * value.abs().max().item() + 1e-7
        torch.testing.assert_close(actual[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f'{key}: {m}')
