# SPDX-License-Identifier: Apache-2.0
"""The command-line tools, run as a user runs them, on a dataset of a few scenes."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mmdcn.checkpoints.safe_globals import load_training
from mmdcn.datasets import mnist_scenes

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
EPOCHS = 4
Tool = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope='session')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'mnist_scenes'
    assert mnist_scenes.main(['--out-dir', str(folder), '--num-train', '8', '--num-test', '4', '--size', '96']) == 0
    return folder


def options(data: Path) -> list[str]:
    """Shrink the experiment to seconds."""
    return [
        '--cfg-options',
        f'train_cfg.max_epochs={EPOCHS}',
        f'train_cfg.val_interval={EPOCHS}',
        'train_dataloader.batch_size=4',
        'default_hooks.logger.interval=1',
        'model.backbone.base_channels=8',
        'model.neck.in_channels=[8,16,32,64]',
        *(f'{loop}_dataloader.dataset.data_root={data}/' for loop in ('train', 'val', 'test')),
        *(f'{loop}_evaluator.ann_file={data}/annotations/test.json' for loop in ('val', 'test')),
    ]


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(tool, *arguments), capture_output=True, text=True, cwd=ROOT, check=False)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_training(checkpoint)['state_dict']


@pytest.fixture(scope='session')
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp('trained')
    result = run('train.py', CONFIG, '--work-dir', work_dir, *options(scenes))
    assert result.returncode == 0, result.stderr
    return work_dir


def test_training_saves_a_checkpoint_and_its_average_precision(trained: Path) -> None:
    assert (trained / f'epoch_{EPOCHS}.pth').is_file()
    (log,) = trained.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert 0 <= entries[-1]['coco/bbox_mAP_50'] <= 1
    assert len([entry for entry in entries if 'loss' in entry]) == 2 * EPOCHS


def test_a_head_with_fewer_classes_than_the_data_is_named(scenes: Path, tmp_path: Path) -> None:
    given = 'model.roi_head.bbox_head.num_classes=4'
    result = run('train.py', CONFIG, '--work-dir', tmp_path, *options(scenes), given)
    assert result.returncode == 1
    expected = f'error: the training data has 10 classes, but the config has {given}'
    assert result.stderr.splitlines()[-1] == expected


def test_training_moves_the_offsets(trained: Path) -> None:
    offsets = [value for key, value in weights(trained / f'epoch_{EPOCHS}.pth').items() if 'conv_offset' in key]
    assert offsets
    assert all(value.abs().max() > 0 for value in offsets)


def test_testing_prints_the_average_precision_of_the_training(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """`--out` dumps the detections, `--show-dir` draws them."""
    out = tmp_path / 'detections.pkl'
    result = run(
        'test.py', CONFIG, trained / f'epoch_{EPOCHS}.pth', '--work-dir', tmp_path, '--out', out,
        '--show-dir', 'pictures', *options(scenes),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (log,) = trained.glob('*/vis_data/scalars.json')
    expected = json.loads(log.read_text().splitlines()[-1])['coco/bbox_mAP_50']
    assert f'coco/bbox_mAP_50: {expected:.4f}' in result.stdout + result.stderr
    assert len(pickle.loads(out.read_bytes())) == 4
    assert len(list(tmp_path.glob('**/pictures/**/*.png'))) == 4


def test_test_time_augmentation_runs_without_a_word_in_the_config(trained: Path, scenes: Path, tmp_path: Path) -> None:
    checkpoint = trained / f'epoch_{EPOCHS}.pth'
    result = run('test.py', CONFIG, checkpoint, '--work-dir', tmp_path, '--tta', *options(scenes))
    assert result.returncode == 0, result.stderr
    assert 'coco/bbox_mAP_50' in result.stdout + result.stderr


def test_a_killed_run_resumes_and_ends_with_the_same_bits(trained: Path, scenes: Path, tmp_path: Path) -> None:
    arguments = command('train.py', CONFIG, '--work-dir', tmp_path, '--resume', *options(scenes))
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        while not (tmp_path / 'last_checkpoint').exists():
            assert process.poll() is None, 'ended before its first checkpoint'
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / f'epoch_{EPOCHS}.pth').exists(), 'was not killed in time'

    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert 'resumed epoch: ' in result.stdout + result.stderr
    expected = weights(trained / f'epoch_{EPOCHS}.pth')
    resumed = weights(tmp_path / f'epoch_{EPOCHS}.pth')
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_mixed_precision_trains_on_a_cpu_and_resumes_with_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    """It is asked for by `--amp` or by the config."""

    def train(name: str, epochs: int, *arguments: str, extra: tuple[str, ...] = ()) -> Path:
        settings = (*options(scenes), f'train_cfg.max_epochs={epochs}', *extra)
        result = run('train.py', CONFIG, '--work-dir', tmp_path / name, *arguments, *settings)
        assert result.returncode == 0, result.stderr
        assert 'mmdcn.AmpOptimWrapper' in next((tmp_path / name).glob('*.py')).read_text()
        return tmp_path / name / f'epoch_{epochs}.pth'

    expected = weights(train('option', 2, '--amp'))
    train('config', 1, extra=('optim_wrapper.type=AmpOptimWrapper',))
    resumed = weights(train('config', 2, '--amp', '--resume'))
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert all(value.dtype != torch.bfloat16 for value in expected.values())


WAITING = {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'}
WITHOUT_TORCH = """
import os, runpy, sys
sys.modules['torch'] = None  # so that its import ends the tool
try:
    runpy.run_path(sys.argv[1])
except ImportError:
    print(os.environ.get('GOMP_SPINCOUNT'))
"""


@pytest.mark.parametrize(
    'tool',
    ['tools/train.py', 'tools/test.py', 'tools/analysis_tools/visualize_offsets.py', 'demo/image_demo.py',
     'benchmarks/demo.py'],
)  # fmt: skip
@pytest.mark.parametrize(
    ('policy', 'count'),
    [({}, '3000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'PASSIVE'}, 'None')],
    ids=['nothing', 'a count', 'a policy'],
)
def test_a_tool_sets_how_long_threads_spin_before_it_imports_torch(
    tool: str, policy: dict[str, str], count: str
) -> None:
    """What the user has set stays."""
    env = {key: value for key, value in os.environ.items() if key not in WAITING} | policy
    arguments = [sys.executable, '-c', WITHOUT_TORCH, str(ROOT / tool)]
    result = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [count]


@pytest.mark.skipif(sys.platform != 'linux', reason='torch has another OpenMP')
def test_the_openmp_of_torch_takes_the_number_of_turns() -> None:
    env = {key: value for key, value in os.environ.items() if key not in WAITING} | {'OMP_DISPLAY_ENV': 'VERBOSE'}
    result = subprocess.run(command('train.py', '--help'), env=env, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '3000'" in result.stderr


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def test_a_checkpoint_that_would_run_code_is_refused(scenes: Path, tmp_path: Path) -> None:
    torch.save({'state_dict': {}, 'meta': Call(os.mkdir, str(tmp_path / 'harm'))}, tmp_path / 'harm.pth')
    result = run('test.py', CONFIG, tmp_path / 'harm.pth', '--work-dir', tmp_path, *options(scenes))
    assert result.returncode == 1
    assert 'error: the checkpoint named above holds posix.mkdir' in result.stderr
    assert f'path: {tmp_path}/harm.pth' in result.stdout + result.stderr
    assert not (tmp_path / 'harm').exists()


@pytest.fixture(scope='session')
def inspected(trained: Path, scenes: Path) -> tuple[Path, Path, Path]:
    """An image, a config and a checkpoint."""
    (config,) = trained.glob('*.py')
    return next((scenes / 'test').glob('*')), config, trained / f'epoch_{EPOCHS}.pth'


def test_every_view_of_the_offsets_is_drawn(inspected: tuple[Path, Path, Path], tmp_path: Path) -> None:
    result = run(
        'analysis_tools/visualize_offsets.py', *inspected, '--out-dir', tmp_path, '--score', '0.02', '--format', 'jpg',
        '--location', '40', '30', '--layer', 'backbone.layer4.1.conv2',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    stem = inspected[0].stem
    expected = {'detections.jpg', *(f'{stem}_{view}.jpg' for view in ('points', 'maps', 'receptive_field'))}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(path.read_bytes().startswith(b'\xff\xd8') for path in tmp_path.iterdir())


def test_the_offset_explorer_is_written(inspected: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'page.html'
    result = run('analysis_tools/offset_explorer.py', *inspected, '--out', out, '--title', 'A <scene>')
    assert result.returncode == 0, result.stderr
    page = out.read_text()
    assert '"title":"A \\u003cscene>"' in page
    assert page.count('"network_stride"') == 6


@pytest.mark.parametrize(
    ('tool', 'extra', 'words'),
    [
        ('visualize_offsets.py', ['--layer', 'backbone.conv1'], '--layer must be one of backbone.layer2.0.conv2, '),
        ('visualize_offsets.py', ['--location', '96', '0'], '--location must be inside the image of 96 x 96 pixels'),
        ('visualize_offsets.py', ['--device', 'cuda:99'], '--device must be a device that torch can use, got cuda:99'),
    ],
)
def test_a_place_a_layer_or_a_device_that_is_not_there_is_named(
    tool: str, extra: list[str], words: str, inspected: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    result = run(f'analysis_tools/{tool}', *inspected, *extra, '--views', 'detections', 'points', '--out-dir', tmp_path)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_named(inspected: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / 'page.html'
    result = run('analysis_tools/offset_explorer.py', tmp_path / 'none.png', *inspected[1:], '--out', out)
    assert result.stderr.splitlines()[-1] == f'error: image {tmp_path}/none.png does not exist'
    assert not out.exists()


def test_the_shapes_of_a_layer_are_printed() -> None:
    result = run('analysis_tools/op_shapes.py', '--size', '6', '9', '--stride', '2', '--deform-groups', '4')
    assert result.returncode == 0, result.stderr
    rows = [
        [cell.strip() for cell in line.split('|')[1:4]] for line in result.stdout.splitlines() if line.startswith('|')
    ]
    assert ['geometric sensitivity', '[B, G, C_in/G, K, (y, x), P]', '[2, 4, 2, 9, 2, 15]'] in rows
    assert ["offset's gradient", '[B, 2*G*K, H_out, W_out]', '[2, 72, 3, 5]'] in rows


def test_a_layer_that_cannot_be_built_is_one_line() -> None:
    result = run('analysis_tools/op_shapes.py', '--deform-groups', '3')
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('error: ')
    assert 'Traceback' not in result.stderr


def test_the_complexity_of_a_detector_is_printed() -> None:
    result = run(
        'analysis_tools/get_flops.py', CONFIG, '--shape', '64', '96', *options(Path())[:1], *options(Path())[5:7]
    )
    assert result.returncode == 0, result.stderr
    layers = [line.split('|')[1].strip() for line in result.stdout.splitlines() if line.startswith('|')]
    assert {'backbone.layer2.0.conv2', 'backbone.layer2.0.conv2.conv_offset', 'all'} <= set(layers)


def truncated(scenes: Path, folder: Path) -> Path:
    copy = folder / 'truncated'
    shutil.copytree(scenes, copy)
    for image in (copy / 'train').glob('*.png'):
        image.write_bytes(image.read_bytes()[:2000])
    return copy


def missing_annotations(scenes: Path, folder: Path) -> Path:
    copy = folder / 'mnist_scenes'
    shutil.copytree(scenes, copy)
    (copy / 'annotations/train.json').unlink()
    return copy


@pytest.mark.parametrize(
    ('data', 'option', 'words'),
    [
        (missing_annotations, None, ['annotations/train.json does not exist', 'dataset_converters/mnist_scenes.py']),
        (truncated, None, ['.png could not be read as an image', 'truncated', 'make or download it again']),
        (None, 'model.backbone.dcn.type=mmdcn.DCNv2x', ['model.backbone.dcn.type', "'mmdcn.DCNv2x'", "mean 'DCNv2'"]),
        (None, 'model.type=FasterRCN', ['model.type', "'FasterRCN'", "mean 'FasterRCNN'"]),
        (None, 'train_dataloader.dataset.type=CocoDatset', ['train_dataloader.dataset.type', "'CocoDataset'"]),
        pytest.param(
            None, 'model.backbone.init_cfg=dict(type="Pretrained",checkpoint="torchvision://resnet50")',
            ['backbone.init_cfg.checkpoint: torchvision://resnet50 needs torchvision', '`pip install torchvision`'],
            marks=pytest.mark.skipif(find_spec('torchvision') is not None, reason='torchvision is installed'),
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_line_and_leaves_no_checkpoint(
    data: Callable[[Path, Path], Path] | None, option: str | None, words: list[str], scenes: Path, tmp_path: Path
) -> None:
    folder = data(scenes, tmp_path) if data else scenes
    extra = [option] if option else []
    result = run('train.py', CONFIG, '--work-dir', tmp_path / 'work', *options(folder), *extra)
    message = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert message.startswith('error: ')
    assert all(word in message for word in words), message
    assert 'Traceback' not in result.stderr
    assert not list(tmp_path.glob('work/**/*.pth'))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('train.py', 'configs/none.py'), ['config configs/none.py does not exist']),
        (('test.py', CONFIG, 'none.pth'), ['checkpoint none.pth does not exist', 'tools/train.py']),
        (
            ('train.py', 'configs/dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py'),
            ['data/coco/annotations/instances_train2017.json does not exist', 'mim download mmdet'],
        ),
    ],
    ids=['config', 'checkpoint', 'coco'],
)
def test_what_is_missing_is_named_with_what_to_do(arguments: tuple, words: list[str], tmp_path: Path) -> None:
    result = run(*arguments, '--work-dir', tmp_path)
    message = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert message.startswith('error: ')
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())
