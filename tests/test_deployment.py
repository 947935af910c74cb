# SPDX-License-Identifier: Apache-2.0
"""Exported detectors detect what mmdet's own code does."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mmcv
import mmcv.ops
import onnx
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from small_detectors import build, faster_rcnn_config, fcos_config
from torch import Tensor, nn

import mmdcn
from mmdcn import deployment
from mmdcn.utils.files import replacing

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
ANCHORS = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[4, 8, 16])
BN = dict(type='BN')
HEADS: dict[str, dict] = {
    'FCOSHead': {},
    'RetinaHead': dict(anchor_generator=dict(ANCHORS, scales_per_octave=2)),
    'ATSSHead': dict(norm_cfg=BN, anchor_generator=ANCHORS),
    'GFLHead': dict(norm_cfg=BN, anchor_generator=ANCHORS, reg_max=4),
    'VFNetHead': dict(
        norm_cfg=BN,
        anchor_generator=dict(ANCHORS, center_offset=0.0),
        regress_ranges=((-1, 4), (4, 8), (8, 1e8)),
        strides=(4, 8, 16),
    ),
    'RepPointsHead': dict(norm_cfg=BN, point_feat_channels=8, point_strides=[4, 8, 16]),
}


def one_stage_config(head: str) -> ConfigDict:
    cfg = ConfigDict(fcos_config())
    if head != 'FCOSHead':
        cfg.type = 'RepPointsDetector' if head == 'RepPointsHead' else 'RetinaNet'
        cfg.bbox_head = ConfigDict(
            type=head, num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1, **HEADS[head]
        )
    return cfg


def pooling_config(layer: str) -> ConfigDict:
    cfg = faster_rcnn_config()
    cfg.roi_head.bbox_roi_extractor.update(type='mmdcn.SingleRoIExtractor')
    cfg.roi_head.bbox_roi_extractor.roi_layer = dict(
        type=layer, output_size=7, output_channels=8, sampling_ratio=0, deform_fc_channels=8
    )
    return cfg


def cascade_config() -> ConfigDict:
    cfg = faster_rcnn_config()
    theirs = Config.fromfile(ROOT / 'configs/dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py').model
    cfg.type, cfg.roi_head, cfg.test_cfg.rcnn = theirs.type, theirs.roi_head, theirs.test_cfg.rcnn
    cfg.train_cfg = theirs.train_cfg
    cfg.roi_head.bbox_roi_extractor.update(out_channels=8, featmap_strides=[4, 8, 16])
    for head in cfg.roi_head.bbox_head:
        head.update(in_channels=8, fc_out_channels=8, num_classes=3)
    return cfg


def two_stage_config(name: str) -> ConfigDict:
    if name == 'cascade':
        cfg = cascade_config()
    else:
        cfg = faster_rcnn_config() if name == 'RoIAlign' else pooling_config(name)
    cfg.test_cfg.rpn.update(nms_pre=50, max_per_img=30)
    return cfg


TWO_STAGES = ('RoIAlign', 'mmdcn.DeformRoIPoolPack', 'mmdcn.ModulatedDeformRoIPoolPack', 'cascade')


def detector(cfg: ConfigDict) -> nn.Module:
    """Build a detector whose scores, boxes and offsets are the images' doing."""
    torch.manual_seed(0)
    model = build(cfg).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith(('backbone.', 'neck.')):
            nn.init.normal_(module.weight, std=0.5 / module.weight[0].numel() ** 0.5)
        if name.endswith('conv_offset'):
            nn.init.normal_(module.weight, std=0.05)
    return model


def batch(model: Any, *sizes: tuple[int, int]) -> tuple[Tensor, list[DetDataSample]]:
    """Images of these sizes, padded to one, as mmdet's own code takes them."""
    generator = torch.Generator().manual_seed(1)
    pictures = [255 * torch.rand(3, *size, generator=generator) for size in sizes]
    samples = [DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1))) for size in sizes]
    data = model.data_preprocessor(dict(inputs=pictures, data_samples=samples))
    return data['inputs'] / 255, data['data_samples']


def assert_detects_the_same(model: Any, detect: Callable[..., Any], *sizes: tuple[int, int]) -> None:
    images, samples = batch(model, *sizes)
    with torch.no_grad():
        expected = model.predict(images, samples, rescale=False)
    found = detect(images, torch.tensor(sizes))
    for sample, boxes, scores, labels in zip(expected, *found, strict=True):
        instances, count = sample.pred_instances, len(sample.pred_instances)
        assert count > 1
        assert labels[count:].eq(-1).all() and scores[count:].eq(0).all() and boxes[count:].eq(0).all()
        torch.testing.assert_close(scores[:count], instances.scores, rtol=0, atol=1e-4)
        # Scores that differ by a rounding may change places, so each detection is looked for.
        same = InstanceData(bboxes=boxes[:count], scores=scores[:count], labels=labels[:count])
        assert deployment.distances(instances, same).max() <= 1e-4


@pytest.mark.parametrize('head', HEADS)
def test_a_one_stage_detector_detects_what_mmdets_does(head: str) -> None:
    model = mmdcn.convert_model(detector(one_stage_config(head)))
    assert_detects_the_same(model, deployment.Detector(model), (48, 80), (61, 43))


@pytest.mark.parametrize('kind', TWO_STAGES)
def test_a_two_stage_detector_detects_what_mmdets_does(kind: str) -> None:
    model = detector(two_stage_config(kind))
    assert_detects_the_same(model, deployment.Detector(model), (48, 80), (61, 43))


@pytest.mark.parametrize('name', ['RetinaHead', 'mmdcn.ModulatedDeformRoIPoolPack'])
def test_onnx_runtime_detects_the_same_in_images_of_any_number_and_size(name: str, tmp_path: Path) -> None:
    model = detector(one_stage_config(name) if name in HEADS else two_stage_config(name))
    path = tmp_path / 'detector.onnx'
    deployment.export_onnx(model, path, dict(classes='a\nb\nc'), size=(64, 96))
    described = onnx.load(path)
    assert {node.domain for node in described.graph.node} == {''} and not described.functions
    assert 'DeformConv' in {node.op_type for node in described.graph.node}
    assert [(entry.key, entry.value) for entry in described.metadata_props] == [('classes', 'a\nb\nc')]
    detect = deployment.load(path)
    assert_detects_the_same(model, detect, (48, 80))
    assert_detects_the_same(model, detect, (61, 43), (64, 96), (33, 90))


@pytest.fixture(scope='session')
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo/cpp, built."""
    folder = tmp_path_factory.mktemp('cpp')
    prefix = f'-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}'
    subprocess.run(['cmake', '-S', ROOT / 'demo/cpp', '-B', folder, prefix], check=True, capture_output=True)
    subprocess.run(['cmake', '--build', folder], check=True, capture_output=True)
    return folder / 'detect'


@pytest.mark.skipif(not (shutil.which('cmake') and shutil.which('c++')), reason='needs CMake and a C++ compiler')
@pytest.mark.filterwarnings('ignore:.isinstance.treespec, LeafSpec:FutureWarning')
def test_a_compiled_detector_detects_the_same_in_python_and_in_cpp(program: Path, tmp_path: Path) -> None:
    cfg = one_stage_config('FCOSHead')
    cfg.data_preprocessor.update(mean=[120.0, 110.0, 100.0], std=[60.0, 55.0, 50.0], bgr_to_rgb=True)
    cfg.backbone.update(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,), stage_with_dcn=(False, True))
    cfg.neck = None
    cfg.bbox_head.update(in_channels=16, strides=(8,), regress_ranges=((-1, 1e8),))
    model = detector(cfg)
    model.dataset_meta = dict(classes=('one', 'two', 'three'))
    package = tmp_path / 'detector.pt2'
    deployment.export_aoti(model, package, deployment.describe(model, Config()), size=(64, 96))
    assert_detects_the_same(model, deployment.load(package), (48, 80))
    assert_detects_the_same(model, deployment.load(package), (61, 43), (64, 96), (33, 90))

    picture = torch.randint(256, (61, 43, 3), dtype=torch.uint8)  # BGR
    mmcv.imwrite(picture.numpy(), str(tmp_path / 'picture.ppm'))
    sample = DetDataSample(metainfo=dict(img_shape=(61, 43), ori_shape=(61, 43), scale_factor=(1, 1)))
    with torch.no_grad():
        (expected,) = model.test_step(dict(inputs=[picture.permute(2, 0, 1)], data_samples=[sample]))
    run = subprocess.run([program, package, tmp_path / 'picture.ppm'], check=True, capture_output=True, text=True)
    rows = [line.split() for line in run.stdout.splitlines()]
    instances = expected.pred_instances
    assert len(rows) > 5
    assert [row[0] for row in rows] == [model.dataset_meta['classes'][label] for label in instances.labels]
    numbers = torch.tensor([[float(number) for number in row[1:]] for row in rows])
    torch.testing.assert_close(numbers[:, 0], instances.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(numbers[:, 1:], instances.bboxes, rtol=0, atol=1e-4)


def test_the_distance_of_detections_is_to_the_nearest_of_the_same_label() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 5.0, 5.0], [2.0, 2.0, 6.0, 6.0]])
    first = InstanceData(bboxes=boxes, scores=torch.tensor([0.5, 0.5, 0.5]), labels=torch.tensor([0, 1, 2]))
    second = InstanceData(bboxes=boxes[:2] + 0.25, scores=torch.tensor([0.5, 0.0]), labels=torch.tensor([0, 1]))
    assert deployment.distances(first, second).tolist() == [0.25, 0.5, torch.inf, 0.25, 0.5]
    assert deployment.distances(first[:0], second).tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize('score_threshold', [-1.0, 0.5])
def test_the_mask_of_suppression_is_that_of_mmcvs_nms(score_threshold: float) -> None:
    corners = 40 * torch.rand(3, 90, 2)
    boxes, scores = torch.cat([corners, corners + 5 + 20 * torch.rand(3, 90, 2)], dim=2), torch.rand(3, 90)
    mask = torch.ops.mmdcn.nms_mask(boxes, scores, 0.4, score_threshold)
    for image in range(3):
        _, kept = mmcv.ops.nms(boxes[image], scores[image], 0.4, score_threshold=max(score_threshold, 0))
        assert mask[image].nonzero().flatten().tolist() == sorted(kept.tolist())
        assert 0 < len(kept) < 90


def test_no_candidates_give_no_detections() -> None:
    model = detector(one_stage_config('RetinaHead'))
    model.bbox_head.test_cfg.score_thr = 1.0
    boxes, scores, labels = deployment.Detector(model)(*[batch(model, (48, 80))[0], torch.tensor([[48, 80]])])
    assert boxes.eq(0).all() and scores.eq(0).all() and labels.eq(-1).all()


def soft_nms(cfg: ConfigDict) -> None:
    cfg.test_cfg.rcnn.nms = dict(type='soft_nms', iou_threshold=0.5)


def max_pooling(cfg: ConfigDict) -> None:
    cfg.roi_head.bbox_roi_extractor.roi_layer.pool_mode = 'max'


def other_extractor(cfg: ConfigDict) -> None:
    cfg.roi_head.bbox_roi_extractor.type = 'GenericRoIExtractor'


def other_head(cfg: ConfigDict) -> None:
    cfg.roi_head.type = 'DoubleHeadRoIHead'
    cfg.roi_head.reg_roi_scale_factor = 1.3


def box_head_of_its_own(cfg: ConfigDict) -> None:
    cfg.roi_head.bbox_head = get_config('mmdet::sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py').model.roi_head.bbox_head


def no_limit(cfg: ConfigDict) -> None:
    cfg.test_cfg.rcnn.max_per_img = -1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (soft_nms, r"test_cfg.rcnn.nms must be dict\(type='nms'.*soft_nms"),
        (max_pooling, 'pool_mode=max.* cannot be exported; mmdcn.DeformRoIPool'),
        (other_extractor, 'GenericRoIExtractor cannot be exported; SingleRoIExtractor can'),
        (box_head_of_its_own, 'the predictions of SABLHead cannot be exported; those of BBoxHead'),
        (no_limit, 'test_cfg.rcnn.max_per_img must be positive to be exported, got -1'),
        (other_head, 'DoubleHeadRoIHead cannot be exported; those of StandardRoIHead and CascadeRoIHead'),
    ],
)
def test_what_cannot_be_exported_is_named(change: Callable[[ConfigDict], None], message: str) -> None:
    cfg = faster_rcnn_config()
    change(cfg)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        deployment.Detector(build(cfg))


@pytest.mark.parametrize('head', ['YOLOXHead', 'FoveaHead', 'TOODHead', 'PAAHead'])
def test_a_head_that_predicts_in_its_own_way_is_named(head: str) -> None:
    cfg = one_stage_config('ATSSHead')
    cfg.bbox_head.type = head
    if head in ('YOLOXHead', 'FoveaHead'):
        cfg.bbox_head.pop('anchor_generator')
    with pytest.raises(NotImplementedError, match=f'the predictions of {head} cannot be exported; those of Base'):
        deployment.Detector(build(cfg))


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / 'tools/deployment' / tool, *map(str, arguments)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)


def test_the_tools_export_a_checkpoint_and_compare_its_average_precision(tmp_path: Path) -> None:
    data, path = tmp_path / 'data', tmp_path / 'detector.onnx'
    converter = [sys.executable, ROOT / 'tools/dataset_converters/mnist_scenes.py']
    subprocess.run([*converter, '--out-dir', data, '--num-train', '1', '--num-test', '4'], check=True)
    checkpoint = ROOT / 'configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes-c554e74f.pth'
    exported = run('export_onnx.py', CONFIG, checkpoint, '--out', path, '--size', 96, 96)
    assert exported.returncode == 0, exported.stderr
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata['classes'].split('\n') == [*'0123456789'] and metadata['scale'] == '160 160'
    tested = run(
        'test.py', CONFIG, checkpoint, path, '--work-dir', tmp_path / 'work', '--cfg-options',
        f'test_dataloader.dataset.data_root={data}/', f'test_evaluator.ann_file={data}/annotations/test.json',
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    rows = {cells[1].strip(): cells[2:4] for line in tested.stdout.splitlines() if len(cells := line.split('|')) == 5}
    precision, exported_precision = map(float, rows['coco/bbox_mAP'])
    assert precision > 0.4
    assert exported_precision == pytest.approx(precision, abs=0.001)
    assert int(rows['without a match within 0.0001'][1]) == 0


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let every write fail after 10 kB of a file, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures('full_disk')
def test_a_failed_export_leaves_the_older_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / 'detector.onnx'
    path.write_bytes(b'older')
    with pytest.raises(OSError, match='File too large'):
        deployment.export_onnx(detector(one_stage_config('FCOSHead')), path, {}, size=(64, 96))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == {path: b'older'}


def test_an_onnx_model_moves_with_its_file_of_weights(tmp_path: Path) -> None:
    program = torch.onnx.export(nn.Linear(40, 30), (torch.ones(1, 40),), dynamo=True, verbose=False)
    with replacing(tmp_path / 'new' / 'linear.onnx') as beside:
        program.save(beside, external_data=True)
    assert {path.name for path in (tmp_path / 'new').iterdir()} == {'linear.onnx', 'linear.onnx.data'}
    model = onnx.load(tmp_path / 'new' / 'linear.onnx')
    assert {each.dims[-1] for each in model.graph.initializer} == {30, 40}


@pytest.mark.parametrize('tool', ['export_onnx.py', 'export_aoti.py'])
def test_a_tool_names_a_file_that_is_missing(tool: str, tmp_path: Path) -> None:
    result = run(tool, CONFIG, tmp_path / 'missing.pth', '--out', tmp_path / ('x.onnx' if 'onnx' in tool else 'x.pt2'))
    assert result.returncode == 1 and 'missing.pth does not exist' in result.stderr.splitlines()[-1]
