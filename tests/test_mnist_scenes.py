# SPDX-License-Identifier: Apache-2.0
"""mmdcn.datasets.mnist_scenes: which digits a scene has, how they are deformed, and where their boxes lie."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_datasets import contents, load, make_mnist

from mmdcn.datasets import mnist_scenes


@pytest.fixture(scope='session')
def digits() -> mnist_scenes.Source:
    return mnist_scenes.Source.load()


def annotations(out: Path) -> Iterator[dict]:
    for split in ('train', 'test'):
        yield from load(out, split)['annotations']


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
