# SPDX-License-Identifier: Apache-2.0
"""mmdcn.datasets.neon_trees: the tiles together make up the photographs, and each has the boxes of its trees."""

import zipfile
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_datasets import load

from mmdcn.datasets import coco_folder, neon_trees

PHOTO_TREES = {
    '2019_YELL_2_528000_4978000_image_crop2': 574,
    'SOAP_061': 37,
    '2019_YELL_2_541000_4977000_image_crop': 279,
    'OSBS_029': 61,
}


@pytest.fixture(scope='session')
def photos() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with zipfile.ZipFile(coco_folder.fetch_wheel(neon_trees.WHEEL)) as wheel:
        return {photo: neon_trees.read_photo(wheel, photo) for photo in PHOTO_TREES}


@pytest.fixture(scope='session')
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'neon'
    assert neon_trees.main(['--out-dir', str(out)]) == 0
    return out


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
