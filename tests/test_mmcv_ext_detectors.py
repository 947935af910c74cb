# SPDX-License-Identifier: Apache-2.0
"""mmdet's own detectors on mmdcn.openmmlab.mmcv_ext: they detect and learn as on mmcv's compiled operators."""

import sys
from typing import Any

import pytest
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from small_detectors import build, images, sample
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


def detections(model: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        results = model.eval().test_step(dict(inputs=images(), data_samples=[sample(), sample()]))
    return [dict(result.pred_instances.items()) for result in results]


def losses_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    samples = [sample(), sample()]
    for each in samples:
        each.gt_instances.masks = BitmapMasks([m.numpy() for m in (torch.rand(2, 48, 80) > 0.5).byte()], 48, 80)
    torch.manual_seed(0)  # of samplers
    data = model.train().data_preprocessor(dict(inputs=images(), data_samples=samples), True)
    losses, values = model.parse_losses(model.loss(**data))
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
        scale = value.abs().max().item()
        torch.testing.assert_close(
            actual[key], value, rtol=0, atol=2e-3 * scale + 1e-7, msg=lambda m, k=key: f'{k}: {m}'
        )
