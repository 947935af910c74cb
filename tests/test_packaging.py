# SPDX-License-Identifier: Apache-2.0
"""mmengine's hub and MIM find the configs and the tools, in a checkout as in a wheel.

`make wheel` runs this on the installed wheel too, where MIM is at hand.
"""

import ensurepip
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.hub import get_config, get_model

import mmdcn
from mmdcn.modules import ModulatedDeformConv2dPack

ROOT = Path(__file__).parents[1]
MIM = Path(mmdcn.__file__).parent / '.mim'
SCENES = 'mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
ZOO = 'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py'
MODELS = [
    model
    for metafile in Config.fromfile(MIM / 'model-index.yml').Import
    for model in Config.fromfile(MIM / metafile).Models
]
checkout = pytest.mark.skipif(not (ROOT / 'setup.py').exists(), reason='not a checkout')
needs_mim = pytest.mark.skipif(find_spec('mim') is None, reason='MIM is not installed')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'mnist_scenes'
    converter = MIM / 'tools/dataset_converters/mnist_scenes.py'
    size = ('--num-train', '4', '--num-test', '2', '--size', '96')
    subprocess.run([sys.executable, converter, '--out-dir', folder, *size], check=True)
    return folder


def run(*arguments: object, folder: Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def options(data: Path) -> list[str]:
    """Shrink the experiment to seconds."""
    return [
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'model.backbone.base_channels=8',
        'model.neck.in_channels=[8,16,32,64]',
        *(f'{loop}_dataloader.dataset.data_root={data}/' for loop in ('train', 'val', 'test')),
        *(f'{loop}_evaluator.ann_file={data}/annotations/test.json' for loop in ('val', 'test')),
    ]


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model.Name)
def test_the_hub_finds_every_model_of_the_index(model: Config) -> None:
    cfg = get_config(f'mmdcn::{model.Config.removeprefix("configs/")}', pretrained='Weights' in model)
    assert Path(cfg.filename) == MIM / model.Config
    assert cfg.get('model_path') == model.get('Weights')


@pytest.mark.parametrize('name', [SCENES, ZOO])
def test_the_hub_builds_a_model_with_the_layers_of_mmdcn(name: str) -> None:
    model = get_model(f'mmdcn::{name}')
    assert isinstance(model.backbone.layer4[-1].conv2, ModulatedDeformConv2dPack)


def test_a_config_inherits_from_a_config_of_mmdcn_in_any_folder(tmp_path: Path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = 'mmdcn::{SCENES}'\n")
    code = f'import mmdcn; from mmengine.config import Config; print(Config.fromfile({str(config)!r}).model.backbone)'
    assert 'mmdcn.DCNv2' in run('-c', code, folder=tmp_path)


@pytest.mark.parametrize(
    'train',
    [
        pytest.param([MIM / 'tools/train.py'], id='the tool'),
        pytest.param(['-m', 'mim', 'train', 'mmdcn'], id='MIM', marks=needs_mim),
    ],
)
def test_a_config_that_inherits_trains_on_the_classes_of_its_base(
    train: list[object], scenes: Path, tmp_path: Path
) -> None:
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = 'mmdcn::{SCENES}'\n")
    output = run(*train, config, '--work-dir', 'work', *options(scenes), folder=tmp_path)
    assert 'coco/bbox_mAP: ' in output
    assert 'Failed to search registry' not in output


@needs_mim
def test_mim_finds_a_config_by_its_name_and_the_tools(scenes: Path, tmp_path: Path) -> None:
    if MIM.joinpath('configs').is_symlink():
        pytest.skip('MIM asks for the path of a config in a checkout: it sees both its names there')
    arguments = (Path(SCENES).name, '--work-dir', 'work', *options(scenes))
    assert 'Training finished successfully' in run('-m', 'mim', 'train', 'mmdcn', *arguments, folder=tmp_path)
    checkpoint = ('--checkpoint', tmp_path / 'work/epoch_1.pth')
    output = run('-m', 'mim', 'test', 'mmdcn', *arguments[:1], *checkpoint, *arguments[1:], folder=tmp_path)
    assert 'Testing finished successfully' in output


@needs_mim
def test_mim_downloads_a_config_with_its_weights(tmp_path: Path) -> None:
    (model,) = (model for model in MODELS if model.Config.endswith(ZOO))
    tmp_path.joinpath(Path(model.Weights).name).touch()  # as if it had been downloaded before
    run('-m', 'mim', 'download', 'mmdcn', '--config', model.Name, '--dest', tmp_path, folder=tmp_path)
    downloaded = Config.fromfile(tmp_path / f'{model.Name}.py')
    assert downloaded.model == get_config(f'mmdcn::{ZOO}').model


@needs_mim
def test_mim_puts_a_config_beside_the_checkpoint_that_the_zoo_has_fetched(
    tmp_path: Path,
) -> None:
    name = Path(SCENES).stem
    checkpoint = Path(shutil.copy(mmdcn.zoo.fetch(name), tmp_path))
    run('-m', 'mim', 'download', 'mmdcn', '--config', name, '--dest', tmp_path, folder=tmp_path)
    init_detector(str(checkpoint.with_name(f'{name}.py')), str(checkpoint), device='cpu')


@checkout
def test_the_wheels_have_every_config_tool_and_checkpoint(tmp_path: Path) -> None:
    """Configs and tools are in mmdcn's wheel, checkpoints in that of mmdcn-zoo."""
    for distribution, library in ((ROOT, 'mmdcn'), (ROOT / 'packages/mmdcn-zoo', 'zoo')):
        command = [sys.executable, 'setup.py', '--quiet', 'build_py', '--build-lib', str(tmp_path / library)]
        subprocess.run(command, cwd=distribution, check=True)
    listed = ['git', 'ls-files', 'configs', 'tools', 'model-index.yml']
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    checkpoints = [name for name in tracked if name.endswith('.pth')]
    for name in set(tracked) - set(checkpoints):
        assert (tmp_path / 'mmdcn/mmdcn/.mim' / name).read_bytes() == (ROOT / name).read_bytes()
    packed = {path.name: path.read_bytes() for path in tmp_path.rglob('*.pth')}
    assert packed == {Path(name).name: (ROOT / name).read_bytes() for name in checkpoints}
    assert {path.parent for path in tmp_path.rglob('*.pth')} == {tmp_path / 'zoo/mmdcn_zoo'}


@checkout
def test_every_distribution_has_the_version_of_mmdcn() -> None:
    projects = [ROOT / 'pyproject.toml', *ROOT.glob('packages/*/pyproject.toml')]
    assert len(projects) == 3
    for project in projects:
        command = [sys.executable, '-c', 'from setuptools import setup; setup()', '--version']
        result = subprocess.run(command, cwd=project.parent, capture_output=True, text=True, check=True)
        assert result.stdout.split()[-1] == mmdcn.__version__, project


@checkout
def test_what_travels_in_an_sdist_builds_and_needs_no_checkout(tmp_path: Path) -> None:
    command = ['setup.py', '--quiet', 'egg_info', '--egg-base', tmp_path, 'sdist', '--dist-dir', tmp_path]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert {
        'setup.py',
        'pyproject.toml',
        'README.md',
        'LICENSE',
        'csrc/ops/deform_conv2d.cpp',
        'model-index.yml',
    } <= names
    # The tests ask git for the files, and read the pages and results, which are not there.
    assert not [name for name in names if name.startswith(('tests', 'docs', 'experiments'))]
    assert not [name for name in names if name.endswith('.pth')]  # they are in mmdcn-zoo


@checkout
@pytest.mark.parametrize('version', ['65.5.0', '76.1.0'])
def test_a_setuptools_that_is_too_old_is_named_with_the_way_to_upgrade_it(version: str, tmp_path: Path) -> None:
    for wheel in Path(ensurepip.__file__).parent.glob(f'_bundled/setuptools-{version}-*.whl'):
        shutil.unpack_archive(wheel, tmp_path, 'zip')  # what a fresh environment of Python 3.11 has
    if not list(tmp_path.iterdir()):
        (tmp_path / 'setuptools.py').write_text(f'__version__ = {version!r}')
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    result = subprocess.run(
        [sys.executable, 'setup.py', '--version'], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f'mmdcn is built with setuptools 77 or later, got {version}. ')
    assert "pip install 'setuptools>=77,<82'" in message
