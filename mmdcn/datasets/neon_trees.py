# SPDX-License-Identifier: Apache-2.0
"""Make a tree detection dataset from real aerial photographs, with hand-drawn boxes of all 951 trees.

Source: four RGB photographs of the NEON airborne survey, 0.1 m per px, in the deepforest wheel
(only its data is used; none of its code runs):

    photograph                    px           trees
    2019_YELL_2_528000_4978000    2299 x 2472  574    Yellowstone, meadow and open wood
    2019_YELL_2_541000_4977000    1249 x 1035  279    Yellowstone, dense wood and a road
    OSBS_029                       400 x 400    61    Ordway-Swisher, Florida, pine scrub
    SOAP_061                       400 x 400    37    Soaproot Saddle, mostly dead trees

The left two thirds of each photograph are for training, the rest is for testing. So no ground is in
both splits, and both have all four kinds of wood. A detector that is trained from scratch on so few
trees finds hardly any in a kind of wood that it has never seen.

Each part is cut into tiles of nearly equal size, about ``--tile`` px. Every pixel is in exactly one
tile, and no tile is a narrow strip. Boxes are clipped at the borders of a tile, and dropped if less
than 0.4 of their area remains. So some cut trees have a box in two tiles, and a few have none. Some
meadow tiles have no tree. ``photo``, ``left`` and ``top`` of a COCO image say where it was cut.

The only class is 'tree', id 1: only SOAP_061 distinguishes Alive and Dead, and the other photographs
label dead trees as Tree. The source counts pixels from 1 and includes both ends: boxes at the borders
of a photo start at 1 and end at its width or height. So 1 is subtracted from left and top. Nothing is
random.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np

from mmdcn.datasets.coco_folder import CocoSplit, DatasetError, Wheel, build_folder, fetch_wheel, progress, run

WHEEL = Wheel('deepforest', '2.1.0', '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54')
PHOTOS = (
    '2019_YELL_2_528000_4978000_image_crop2',
    '2019_YELL_2_541000_4977000_image_crop',
    'OSBS_029',
    'SOAP_061',
)
SPLITS = {'train': (0, 2 / 3), 'test': (2 / 3, 1)}  # fractions of the width, from the left
MIN_VISIBLE = 0.4


def read_photo(wheel: zipfile.ZipFile, photo: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Read a photograph, uint8 [H, W, 3] BGR, and its boxes [N, 4]: left, top, right, bottom."""
    encoded = np.frombuffer(wheel.read(f'deepforest/data/{photo}.png'), np.uint8)
    image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    tree = ElementTree.fromstring(wheel.read(f'deepforest/data/{photo}.xml'))
    corners = [
        [int(box.findtext(corner, '')) for corner in ('xmin', 'ymin', 'xmax', 'ymax')] for box in tree.iter('bndbox')
    ]
    return image, np.array(corners) - [1, 1, 0, 0]


def cut(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """Cut ``length`` into nearly equal parts of about ``tile``, and return the (start, end) of each."""
    parts = max(1, round(length / tile))
    edges = [length * i // parts for i in range(parts + 1)]
    return pairwise(edges)


def clip_boxes(boxes: np.ndarray[Any, Any], window: Sequence[int]) -> np.ndarray[Any, Any]:
    """Clip boxes [N, 4] to a window, and return those that remain, [M, 4]; all are left, top, right, bottom.

    The returned boxes are relative to the corner of the window. Boxes with less than MIN_VISIBLE of their area in the
    window are dropped.
    """
    low, high = np.array(window[:2]), np.array(window[2:])
    clipped = np.hstack([boxes[:, :2].clip(low, high), boxes[:, 2:].clip(low, high)])
    visible = area(clipped) >= MIN_VISIBLE * area(boxes)
    return clipped[visible] - [*low, *low]


def area(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the area [N] of boxes [N, 4]: left, top, right, bottom."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def convert(args: argparse.Namespace) -> None:
    """Build the dataset. Raises DatasetError for invalid arguments or an unusable folder."""
    if args.tile < 100:
        raise DatasetError(f'--tile is {args.tile}, but must be 100 or more (trees reach 108 px)')

    def build(folder: Path) -> None:
        with zipfile.ZipFile(fetch_wheel(WHEEL)) as wheel:
            for split, (start, end) in SPLITS.items():
                coco = CocoSplit(folder, split, {1: 'tree'})
                for photo in PHOTOS:
                    image, boxes = read_photo(wheel, photo)
                    width = image.shape[1]
                    add_tiles(coco, photo, image, boxes, (round(start * width), round(end * width)), args.tile)
                coco.save(f'NEON trees, {split}, from {WHEEL.requirement}')

    parameters = {'converter': 'neon_trees', 'version': 2, 'source': WHEEL.requirement}
    build_folder(args.out_dir, parameters | {'tile': args.tile}, build)


def add_tiles(
    coco: CocoSplit,
    photo: str,
    image: np.ndarray[Any, Any],
    boxes: np.ndarray[Any, Any],
    columns: tuple[int, int],
    tile: int,
) -> None:
    """Cut the columns (first, last + 1) of a photo [H, W, 3], with boxes [N, 4], into tiles, and add these."""
    first, last = columns
    rows = cut(image.shape[0], tile)
    windows = [(first + x0, y0, first + x1, y1) for y0, y1 in rows for x0, x1 in cut(last - first, tile)]
    for x0, y0, x1, y1 in progress(windows, photo):
        trees = [
            {'bbox': [left, top, right - left, bottom - top], 'category_id': 1}
            for left, top, right, bottom in clip_boxes(boxes, (x0, y0, x1, y1)).tolist()
        ]
        stem = f'{photo}_{x0:04}_{y0:04}'
        coco.add(image[y0:y1, x0:x1], stem, trees, photo=photo, left=x0, top=y0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command-line tool and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out-dir', type=Path, default=Path('data/neon_trees'), help='the folder to write')
    parser.add_argument('--tile', type=int, default=400, help='approximate side of a tile in px')
    args = parser.parse_args(argv)
    return run(lambda: convert(args))
