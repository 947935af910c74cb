# SPDX-License-Identifier: Apache-2.0
"""Training and testing on two processes, on the CPU with gloo."""

import os
import pickle
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from mmdcn.checkpoints.safe_globals import load_training
from mmdcn.datasets import mnist_scenes

ROOT = Path(__file__).parents[1]
EPOCHS = 6
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='two processes would need two GPUs')

# A detector whose loss over a batch is the mean of those over its parts: GroupNorm looks at one image at a time, and
# the losses are divided by the number of all anchors, none of which is ignored or left out.
CONFIG = f"""
_base_ = ['{ROOT}/configs/_base_/default_runtime.py', '{ROOT}/configs/_base_/datasets/mnist_scenes.py']
norm_cfg = dict(type='GN', num_groups=4)
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127], std=[64], pad_size_divisor=32),
    backbone=dict(
        type='mmdcn.ResNet', depth=18, base_channels=8, out_indices=(1, 2, 3), norm_cfg=norm_cfg,
        dcn=dict(type='mmdcn.DCNv2', deform_groups=1), stage_with_dcn=(False, True, True, True)),
    neck=dict(type='FPN', in_channels=[16, 32, 64], out_channels=16, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=10, in_channels=16, feat_channels=16, stacked_convs=1, norm_cfg=norm_cfg,
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[3], strides=[8, 16, 32]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True), loss_bbox=dict(type='L1Loss', loss_weight=9.0)),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.4, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type='RandomSampler', num=1000, pos_fraction=1.0, add_gt_as_proposals=False),
        allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=9))
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9), paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs={EPOCHS}, val_interval={EPOCHS})
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
train_dataloader = dict(batch_size=2)
test_dataloader = dict(batch_size=1)
log_level = 'DEBUG'  # a log of each process
log_processor = dict(num_digits=9, window_size=1)
default_hooks = dict(logger=dict(interval=1))
"""
SHARDED = f"""
_base_ = ['detector.py', '{ROOT}/configs/_base_/strategies/fsdp.py']
"""
DEEPSPEED = f"""
_base_ = ['detector.py', '{ROOT}/configs/_base_/strategies/deepspeed.py']
optim_wrapper = dict(type='DeepSpeedOptimWrapper')
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a dataset and the configs."""
    folder = tmp_path_factory.mktemp('distributed')
    data = folder / 'data/mnist_scenes'
    # 5 test images: one process has more of them than the other.
    assert mnist_scenes.main(['--out-dir', str(data), '--num-train', '8', '--num-test', '5', '--size', '96']) == 0
    for name, config in {'detector': CONFIG, 'sharded': SHARDED, 'deepspeed': DEEPSPEED}.items():
        (folder / f'{name}.py').write_text(config)
    return folder


def start(folder: Path, tool: str, *arguments: object) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    env = {**os.environ, 'PATH': path, 'PORT': str(port), 'OMP_NUM_THREADS': '1'}
    if 'deepspeed.py' in arguments:
        env['PYTHONPATH'] = f'{Path(sys.prefix, "deepspeed")}{os.pathsep}{env.get("PYTHONPATH", "")}'
    return subprocess.Popen(
        [*([sys.executable] if tool.endswith('.py') else []), ROOT / 'tools' / tool, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=env,
    )


def run(folder: Path, tool: str, *arguments: object) -> str:
    process = start(folder, tool, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def losses(log: Path) -> np.ndarray:
    return np.array([float(loss) for loss in re.findall(r'Epoch\(train\).* loss: (\S+)', log.read_text())])


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_training(checkpoint)['state_dict']


@pytest.fixture(scope='module')
def two(folder: Path) -> Path:
    """The work folder of a run on two processes."""
    run(folder, 'dist_train.sh', 'detector.py', 2, '--work-dir', 'two')
    return folder / 'two'


def test_two_processes_learn_like_one_with_the_doubled_batch(folder: Path, two: Path) -> None:
    run(folder, 'train.py', 'detector.py', '--work-dir', 'one', '--cfg-options', 'train_dataloader.batch_size=4')
    (log,) = (folder / 'one').glob('*/*.log')
    first, second = (losses(next(two.glob(f'*/*_rank{rank}.log'))) for rank in range(2))
    assert len(first) == 2 * EPOCHS
    # The largest sum, of 4 x (12² + 6² + 3²) x 10 classes' losses, in another order: √7560 x 2^-24 = 5e-6.
    np.testing.assert_allclose((first + second) / 2, losses(log), rtol=1e-5)
    assert not np.allclose(first, second, rtol=0.1), 'the processes saw the same images'


def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bits(folder: Path, two: Path) -> None:
    command = ('dist_train.sh', 'detector.py', 2, '--resume', '--work-dir', 'killed')
    process = start(folder, *command)
    while not (folder / 'killed/last_checkpoint').exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    (worker,) = (
        child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get('RANK') == '1'
    )
    worker.kill()
    output, _ = process.communicate()
    assert process.returncode == 1
    assert f'Signal 9 (SIGKILL) received by PID {worker.pid}' in output
    assert output.splitlines()[-1].startswith('error: a process failed')
    assert not (folder / f'killed/epoch_{EPOCHS}.pth').exists(), 'was not killed in time'

    assert 'resumed epoch: ' in run(folder, *command)
    expected = weights(two / f'epoch_{EPOCHS}.pth')
    resumed = weights(folder / f'killed/epoch_{EPOCHS}.pth')
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def test_two_processes_detect_what_one_detects(folder: Path, two: Path) -> None:
    checkpoint = two / f'epoch_{EPOCHS}.pth'
    run(folder, 'test.py', 'detector.py', checkpoint, '--out', 'one.pkl')
    output = run(folder, 'dist_test.sh', 'detector.py', checkpoint, 2, '--out', 'two.pkl')
    assert output.count('| coco/bbox_mAP ') == 1
    expected, detected = (pickle.loads((folder / name).read_bytes()) for name in ('one.pkl', 'two.pkl'))
    assert [image['img_id'] for image in detected] == [image['img_id'] for image in expected] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(detected, expected, strict=True):
        assert len(ours['pred_instances']['scores']) == 9
        assert torch.equal(ours['pred_instances']['bboxes'], theirs['pred_instances']['bboxes'])


def test_sharded_parameters_learn_as_whole_ones_and_resume(folder: Path, two: Path) -> None:
    command = ('dist_train.sh', 'sharded.py', 2, '--resume', '--work-dir', 'sharded')
    run(folder, *command, '--cfg-options', 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 2' in run(folder, *command)
    expected = weights(two / f'epoch_{EPOCHS}.pth')
    sharded = weights(folder / f'sharded/epoch_{EPOCHS}.pth')
    # To the bit: the mean over two processes is the same sum in either order.
    assert sharded.keys() == expected.keys()
    assert all(torch.equal(sharded[key], expected[key]) for key in expected)


def test_deepspeed_learns_as_ddp_does_and_resumes_and_tests(folder: Path, two: Path) -> None:
    command = ('dist_train.sh', 'deepspeed.py', 2, '--resume', '--work-dir', 'deepspeed')
    run(folder, *command, '--cfg-options', 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 2' in run(folder, *command)
    expected = weights(two / f'epoch_{EPOCHS}.pth')
    checkpoint = folder / f'deepspeed/epoch_{EPOCHS}.pth'
    learned = load_training(checkpoint / 'mp_rank_00_model_states.pt')['module']
    assert learned.keys() == expected.keys()
    assert all(torch.equal(learned[key], expected[key]) for key in expected)
    assert '| coco/bbox_mAP ' in run(folder, 'dist_test.sh', 'deepspeed.py', checkpoint, 2)
