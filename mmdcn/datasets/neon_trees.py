# SPDX-License-Identifier: Apache-2.0
"""Make a tree detection dataset of real aerial photographs, all 951 trees boxed by hand.

Source: four RGB photographs of the NEON airborne survey, 0.1 m per px, in the deepforest wheel
(data alone; none of its code is run):

    photograph                    px           trees
    2019_YELL_2_528000_4978000    2299 x 2472  574    Yellowstone, meadow and open wood
    2019_YELL_2_541000_4977000    1249 x 1035  279    Yellowstone, dense wood and a road
    OSBS_029                       400 x 400    61    Ordway-Swisher, Florida, pine scrub
    SOAP_061                       400 x 400    37    Soaproot Saddle, mostly dead trees

The left two thirds of each photograph are for training, the rest is for testing: no ground is in
both halves, and both have all four kinds of wood. A detector that is trained from scratch on so few
trees finds hardly any in a wood of a kind that it has never seen.

Each half is cut into near-equal tiles of about ``--tile`` px, so that every pixel is in exactly one
tile and no tile is a sliver. Boxes are clipped at the borders of a tile and dropped where less than
0.4 of their area remains, so some cut trees have a box in two tiles and a few in none. Some meadow
tiles have no tree. ``photo``, ``left`` and ``top`` of a COCO image tell where it was cut.

The one class is 'tree', id 1: SOAP_061 alone tells Alive from Dead, and the others box dead trees
as Tree. The source counts pixels from 1 and includes both ends (boxes at the borders of a photo
start at 1 and end at its width or height), so 1 is taken from the lower ends. Nothing is random.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
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
SPLITS = {'train': (0, 2 / 3), 'test': (2 / 3, 1)}  # from left to right
MIN_VISIBLE = 0.4


def read_photo(wheel: zipfile.ZipFile, photo: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture, uint8 [H, W, 3] BGR, and its boxes [N, 4]: left, top, right, bottom."""
    encoded = np.frombuffer(wheel.read(f'deepforest/data/{photo}.png'), np.uint8)
    image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    tree = ElementTree.fromstring(wheel.read(f'deepforest/data/{photo}.xml'))
    corners = [
        [int(box.findtext(corner, '')) for corner in ('xmin', 'ymin', 'xmax', 'ymax')] for box in tree.iter('bndbox')
    ]
    return image, np.array(corners) - [1, 1, 0, 0]


def cut(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """Return (start, end) of near-equal parts of ``length``, each about ``tile`` long."""
    parts = max(1, round(length / tile))
    edges = [length * i // parts for i in range(parts + 1)]
    return pairwise(edges)


def clip_boxes(boxes: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """Return the boxes [M, 4] of boxes [N, 4] in a window (all left, top, right, bottom).

    They count from the corner of the window; one with less than MIN_VISIBLE of its area in the
    window is left out.
    """
    low, high = np.array(window[:2]), np.array(window[2:])
    clipped = np.hstack([boxes[:, :2].clip(low, high), boxes[:, 2:].clip(low, high)])
    visible = area(clipped) >= MIN_VISIBLE * area(boxes)
    return clipped[visible] - [*low, *low]


def area(boxes: np.ndarray) -> np.ndarray:
    """Return the area [N] of boxes [N, 4]: left, top, right, bottom."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def convert(args: argparse.Namespace) -> None:
    """Build the dataset. Raises DatasetError for arguments or a folder that cannot be used."""
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
    coco: CocoSplit, photo: str, image: np.ndarray, boxes: np.ndarray, columns: tuple[int, int], tile: int
) -> None:
    """Cut columns (first, last + 1) of a photo [H, W, 3] with its boxes [N, 4] (left, top, right, bottom)."""
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
    """Run the command line tool and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out-dir', type=Path, default=Path('data/neon_trees'), help='made here')
    parser.add_argument('--tile', type=int, default=400, help='side of a tile in px, about')
    args = parser.parse_args(argv)
    return run(lambda: convert(args))
