# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is published, found by its name, fetched, checked, and gives what the training gave."""

import functools
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
import yaml
from mmengine.runner import load_checkpoint
from zoo_package import CONFIG, ROOT, Handler, Package

from mmdcn import zoo
from mmdcn.checkpoints.safe_globals import load_training
from mmdcn.datasets import mnist_scenes
from mmdcn.engine.launch import run

PUBLISH = 'tools/model_converters/publish_model.py'


@pytest.fixture(scope='module')
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    data = tmp_path_factory.mktemp('data') / 'mnist_scenes'
    assert mnist_scenes.main(['--out-dir', str(data), '--num-train', '4', '--num-test', '2', '--size', '96']) == 0
    return Package(tmp_path_factory.mktemp('package'), data)


@pytest.fixture(scope='module')
def trained(package: Package) -> Path:
    """A checkpoint of a training with an EMAHook."""
    package.run(ROOT / 'tools/train.py', package.config, '--work-dir', 'work')
    return package.folder / 'work/epoch_1.pth'


@pytest.fixture(scope='module')
def entry(package: Package, trained: Path) -> dict:
    """What the tool says for the metafile, of the checkpoint that it has put beside the config."""
    output = package.run(ROOT / PUBLISH, package.config, trained, '--half')
    (entry,) = yaml.safe_load(output[output.index('- Name') :])
    (log,) = (package.folder / 'work').glob('*/vis_data/scalars.json')
    points = 100 * json.loads(log.read_text().splitlines()[-1])['coco/bbox_mAP']
    entry['Results'] = [{'Task': 'Object Detection', 'Dataset': 'MNIST scenes', 'Metrics': {'box AP': points}}]
    package.list_models(entry)
    return entry


@pytest.fixture
def cache(package: Package, entry: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same zoo for calls in this process, and its cache, which is empty."""
    package.list_models(entry)
    monkeypatch.setattr(zoo, 'MIM', package.mim)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('PYTHONPATH', str(package.folder))
    return tmp_path / 'cache/hub/checkpoints'


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a tool in this process, as its command line would."""

    def call(path: str, *arguments: object) -> int:
        monkeypatch.syspath_prepend(str(ROOT / path.rpartition('/')[0]))
        monkeypatch.setattr(sys, 'argv', [path, *map(str, arguments)])
        return run(import_module(Path(path).stem).main)

    return call


def filename(entry: dict) -> str:
    return entry['Weights'].removeprefix('mmdcn://')


def test_a_published_checkpoint_has_the_averaged_weights_in_half_precision(
    package: Package, trained: Path, entry: dict
) -> None:
    """It has no more of the training than inference needs."""
    training = load_training(trained)
    published = torch.load(package.config.with_name(filename(entry)), weights_only=True)
    averaged = {key: value for key, value in training['ema_state_dict'].items() if key.startswith('module.')}
    assert any(not torch.equal(value, training['state_dict'][key[7:]]) for key, value in averaged.items())
    assert published.keys() == {'meta', 'state_dict'}
    assert published['meta'].keys() == {'dataset_meta', 'cfg', 'mmdcn_version'}
    assert published['meta']['dataset_meta']['classes'] == tuple('0123456789')
    assert published['state_dict'].keys() == training['state_dict'].keys()
    for key, value in training['state_dict'].items():
        expected = value.half() if value.is_floating_point() else value
        assert torch.equal(published['state_dict'][key], expected)
        assert published['state_dict'][key].dtype == expected.dtype


def test_the_hash_is_that_of_the_file_wherever_it_is_published(
    package: Package, trained: Path, entry: dict, tool: Callable[..., int], tmp_path: Path
) -> None:
    """Publishing again gives the same file."""
    assert tool(PUBLISH, package.config, trained, '--half', '--out-dir', tmp_path) == 0
    (again,) = tmp_path.glob('*')
    assert hashlib.sha256(again.read_bytes()).hexdigest() == entry['SHA256']
    assert again.name == filename(entry) == f'tiny-{entry["SHA256"][:8]}.pth'


def other_config(checkpoint: dict) -> str:
    key = next(key for key in checkpoint['state_dict'] if key.endswith('conv_offset.weight'))
    shape = tuple(checkpoint['state_dict'].pop(key).shape)
    return f'{key} is missing in it and {shape} in the model'


def too_large_for_half(checkpoint: dict) -> str:
    checkpoint['state_dict']['backbone.bn1.running_var'][0] = 1e5
    return 'backbone.bn1.running_var has values that are infinite'


def no_classes(checkpoint: dict) -> str:
    del checkpoint['meta']['dataset_meta']
    return "not a training checkpoint of MMEngine: 'dataset_meta'"


@pytest.mark.parametrize('spoil', [other_config, too_large_for_half, no_classes])
def test_what_would_not_work_is_not_published(
    spoil: Callable[[dict], str],
    package: Package,
    trained: Path,
    tool: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = load_training(trained)
    words = spoil(checkpoint)
    torch.save(checkpoint, tmp_path / 'spoilt.pth')
    assert tool(PUBLISH, package.config, tmp_path / 'spoilt.pth', '--half', '--out-dir', tmp_path / 'out') == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def http(package: Package) -> Iterator[str]:
    server = ThreadingHTTPServer(('localhost', 0), functools.partial(Handler, directory=package.config.parent))
    threading.Thread(target=server.serve_forever).start()
    yield f'http://localhost:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint_folder(package: Package, entry: dict) -> Iterator[Path]:
    """The folder that has the checkpoint, as it is not beside its config."""
    folder = package.folder / 'elsewhere/mmdcn_zoo'
    folder.mkdir(parents=True, exist_ok=True)
    beside = package.config.with_name(filename(entry))
    beside.rename(folder / beside.name)
    yield folder
    (folder / beside.name).rename(beside)


def test_a_checkpoint_beside_its_config_is_used_where_it_lies(package: Package, entry: dict, cache: Path) -> None:
    assert zoo.fetch('tiny') == package.config.with_name(filename(entry))
    assert not cache.exists()


@pytest.mark.parametrize('place', ['package', 'folder', 'file'])
def test_a_checkpoint_on_the_disk_is_used_where_it_lies(
    place: str, checkpoint_folder: Path, entry: dict, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == 'package':
        monkeypatch.syspath_prepend(str(checkpoint_folder.parent))
    else:
        monkeypatch.setenv('MMDCN_ZOO', str(checkpoint_folder) if place == 'folder' else checkpoint_folder.as_uri())
    assert zoo.fetch('tiny') == checkpoint_folder / filename(entry)
    assert not cache.exists()


def test_a_checkpoint_is_downloaded_once_and_kept(
    entry: dict, cache: Path, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('MMDCN_ZOO', f'{http}/')
    path = zoo.fetch('tiny')
    assert path == cache / filename(entry)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry['SHA256']
    monkeypatch.setenv('MMDCN_ZOO', '/nowhere')
    assert zoo.fetch('tiny') == path


@pytest.mark.usefixtures('checkpoint_folder', 'cache')
def test_where_no_checkpoint_is_installed_the_error_says_what_to_install(entry: dict) -> None:
    with pytest.raises(zoo.ZooError) as error:
        zoo.fetch('tiny')
    assert str(error.value) == (
        f'{filename(entry)} is not on this machine: install it with `pip install --upgrade mmdcn-zoo`, '
        'or set MMDCN_ZOO to a folder or an address that contains it'
    )


def test_a_wrong_file_is_refused(entry: dict, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / filename(entry)).write_bytes(b'other')
    monkeypatch.setenv('MMDCN_ZOO', str(tmp_path))
    with pytest.raises(zoo.ZooError, match=f'{filename(entry)} has sha256 .*, not {entry["SHA256"]}; MMDCN_ZOO must'):
        zoo.fetch('tiny')
    assert not cache.exists()


def test_a_wrong_file_is_not_kept_after_its_download(
    checkpoint_folder: Path, package: Package, entry: dict, cache: Path, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.config.with_name(filename(entry)).write_bytes(b'other')  # which the server has
    monkeypatch.setenv('MMDCN_ZOO', http)
    with pytest.raises(zoo.ZooError, match=f'invalid hash value .*{entry["SHA256"]}.*MMDCN_ZOO'):
        zoo.fetch('tiny')
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_is_refused_and_not_kept(
    cache: Path, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('MMDCN_ZOO', f'{http}/cut')
    with pytest.raises(zoo.ZooError):
        zoo.fetch('tiny')
    assert list(cache.iterdir()) == []


def test_a_file_that_went_bad_in_the_cache_is_fetched_again(
    entry: dict, cache: Path, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('MMDCN_ZOO', http)
    cache.mkdir(parents=True)
    (cache / filename(entry)).write_bytes(b'bad')
    assert hashlib.sha256(zoo.fetch('tiny').read_bytes()).hexdigest() == entry['SHA256']


@pytest.mark.usefixtures('cache')
@pytest.mark.parametrize(
    ('base', 'words'),
    [
        ('/nowhere', 'MMDCN_ZOO must be a folder, .* and contain tiny-.*.pth, got /nowhere'),
        ('file:///nowhere/', 'MMDCN_ZOO must be a folder, .* and contain tiny-.*.pth, got file:///nowhere'),
        ('s3://bucket', 'or an address that begins with file://, http:// or https://, .* got s3://bucket'),
        ('http://localhost:1', 'http://localhost:1/tiny-.*.pth could not be fetched: .*MMDCN_ZOO'),
    ],
)
def test_a_place_without_the_file_is_named(base: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMDCN_ZOO', base)
    with pytest.raises(zoo.ZooError, match=words):
        zoo.fetch('tiny')


def test_a_name_that_is_not_in_the_zoo_is_named_with_one_that_is(cache: Path) -> None:
    with pytest.raises(zoo.ZooError, match="has no 'tinny'; it has tiny"):
        zoo.find('tinny')


def test_what_mmdet_has_published_is_found_but_not_fetched(package: Package, entry: dict, cache: Path) -> None:
    package.list_models({'Name': 'theirs', 'Config': entry['Config'], 'Weights': 'https://localhost/theirs.pth'})
    assert zoo.find('theirs').weights == 'https://localhost/theirs.pth'
    with pytest.raises(zoo.ZooError, match='theirs is not published by mmdcn'):
        zoo.fetch('theirs')


class Call:
    """Is pickled as a call."""

    def __reduce__(self) -> tuple:
        return os.getcwd, ()


def test_a_file_that_would_run_code_is_not_loaded_even_with_the_right_hash(
    package: Package, entry: dict, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(Call(), tmp_path / 'harm.pth')
    sha256 = hashlib.sha256((tmp_path / 'harm.pth').read_bytes()).hexdigest()
    package.list_models(entry | {'Weights': 'mmdcn://harm.pth', 'SHA256': sha256})
    monkeypatch.setenv('MMDCN_ZOO', str(tmp_path))
    with pytest.raises(UnpicklingError, match='Weights only load failed'):
        load_checkpoint(torch.nn.Module(), 'mmdcn://harm.pth')


def test_the_hub_and_both_inference_apis_find_a_detector_by_its_name(package: Package, entry: dict) -> None:
    """It has the published weights."""
    package.list_models(entry)
    code = f"""
import mmcv, mmdcn, torch
from mmdet.apis import inference_detector, init_detector
from mmengine.hub import get_model

image = mmcv.imread({str(next((package.folder.parent).glob('data*/mnist_scenes/test/*.png')))!r})
hub = get_model('mmdcn::tiny/tiny.py', pretrained=True)  # first, before anything imports mmdcn.zoo
model = mmdcn.zoo.find('tiny')
detector = init_detector(model.config, model.weights, device='cpu')
inferencer = mmdcn.DetInferencer('tiny', device='cpu', show_progress=False)
published = torch.load(mmdcn.zoo.fetch('tiny'), weights_only=True)['state_dict']
for found in (detector, inferencer.model, hub):
    weights = found.state_dict()
    assert all(torch.equal(weights[key], value.to(weights[key])) for key, value in published.items())
    assert {{value.dtype for value in weights.values()}} == {{torch.float32, torch.int64}}
assert inferencer.model.dataset_meta['classes'] == detector.dataset_meta['classes'] == tuple('0123456789')
expected = inference_detector(detector, image).pred_instances
(result,) = inferencer(image, return_datasamples=True)['predictions']
assert len(expected) > 0
assert torch.equal(result.pred_instances.bboxes, expected.bboxes)
assert torch.equal(result.pred_instances.scores, expected.scores)
"""
    package.run('-c', code)


def test_the_check_of_the_zoo_fails_where_a_figure_differs(
    package: Package, entry: dict, cache: Path, tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints each figure of the metafile beside the one it measures."""
    points = entry['Results'][0]['Metrics']['box AP']
    package.list_models(entry | {'Results': [{'Metrics': {'box AP': points, 'mask AP': 41.3}}]})
    status = tool('tools/zoo_check.py')
    output = capsys.readouterr()
    rows = [' '.join(line.split()) for line in output.out.splitlines()]
    assert f'| tiny | box AP | {points:.1f} | {points:.1f} | yes |' in rows, output.err
    assert '| tiny | mask AP | 41.3 | nan | NO |' in rows
    assert '1 of 2 metrics differ' in output.err
    assert status == 1


@pytest.mark.parametrize(('seen', 'agrees'), [(41.2, True), (41.3, True), (41.4, True), (41.1, False), (41.5, False)])
def test_figures_agree_to_a_tenth_of_a_point(seen: float, agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    compare = import_module('zoo_check').compare
    assert list(compare({'box AP': 41.3}, {'box AP': seen})) == [('box AP', 41.3, seen, agrees)]


def test_the_check_of_a_zoo_without_checkpoints_says_so_and_fails(
    package: Package, cache: Path, tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    package.list_models()
    assert tool('tools/zoo_check.py') == 1
    assert 'no model of a metafile has a SHA256' in capsys.readouterr().err


def test_the_check_of_the_zoo_names_missing_data_before_it_tests_a_model(
    package: Package, entry: dict, cache: Path, tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    package.config.with_name('no_data.py').write_text(CONFIG.format(data='/nowhere/mnist_scenes/'))
    package.list_models(entry, entry | {'Name': 'no_data', 'Config': 'configs/tiny/no_data.py'})
    assert tool('tools/zoo_check.py') == 1
    assert capsys.readouterr().err == (
        'error: test_dataloader.dataset.ann_file: /nowhere/mnist_scenes/annotations/test.json does not exist. Get it '
        'with `python tools/dataset_converters/mnist_scenes.py`, or set test_dataloader.dataset.data_root and ann_file '
        'to where it is\n'
    )


def test_the_help_of_the_check_of_the_zoo_says_what_it_does(
    tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not run it."""
    with pytest.raises(SystemExit, match='0'):
        tool('tools/zoo_check.py', '--help')
    assert 'Test every checkpoint published by mmdcn' in capsys.readouterr().out


def test_a_missing_checkpoint_is_one_line_of_the_test_tool(package: Package, entry: dict) -> None:
    package.list_models(entry)
    environment = dict(MMDCN_ZOO='/nowhere', TORCH_HOME=str(package.folder / 'empty'))
    result = package.call(ROOT / 'tools/test.py', package.config, 'tiny', '--work-dir', 'test', **environment)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith('error: MMDCN_ZOO must be') and last.endswith(f'and contain {filename(entry)}, got /nowhere')
    assert 'Traceback' not in result.stderr


def test_the_demo_draws_on_a_picture(package: Package, cache: Path, tool: Callable[..., int], tmp_path: Path) -> None:
    (image, *_) = sorted(package.folder.parent.glob('data*/mnist_scenes/test/*.png'))
    settings = ('--out-dir', tmp_path, '--device', 'cpu', '--pred-score-thr', '0')
    assert tool('demo/image_demo.py', image, 'tiny', *settings) == 0
    drawn = tmp_path / 'vis' / image.name
    assert drawn.read_bytes().startswith(b'\x89PNG')
    assert drawn.read_bytes() != image.read_bytes()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [(('none.png', 'tiny'), 'none.png does not exist'), ((ROOT, 'tinny'), "the model zoo has no 'tinny'; it has tiny")],
)
def test_the_demo_names_what_is_missing(
    arguments: tuple, words: str, cache: Path, tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool('demo/image_demo.py', *arguments) == 1
    assert f'error: {words}' in capsys.readouterr().err


def test_every_shipped_checkpoint_has_its_hash_in_its_name() -> None:
    """It lies beside its config. All together have less than 40 MB."""
    shipped = [model for model in zoo.models() if model.sha256]
    files = [model.config.with_name(model.weights.removeprefix(zoo.ADDRESS)) for model in shipped]
    for model, file in zip(shipped, files, strict=True):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == model.sha256
        assert file.stem == f'{model.name}-{model.sha256[:8]}'
    assert 0 < sum(file.stat().st_size for file in files) < 40e6
