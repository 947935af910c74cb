# SPDX-License-Identifier: Apache-2.0
"""Make a dataset of five photographs in the layout of COCO, to try out the configs of the zoo.

The photographs are part of scikit-image. Their objects were outlined by hand for this dataset:

    split      photograph       objects
    train2017  astronaut        person
               chelsea          cat
               coffee           cup, spoon, dining table
               motorcycle_left  motorcycle, bench, bicycle
    val2017    camera           person

Folders, files and categories have COCO's names, so a config only needs another ``data_root``. The stuff maps, which
HTC reads, contain the category id minus 1 at the pixels of the outlined objects, and 255 elsewhere. Nothing is random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from mmdet.datasets import CocoDataset

from mmdcn.datasets.coco_folder import CocoSplit, DatasetError, build_folder, run

Polygon = tuple[tuple[int, int], ...]  # (x, y) in px

PHOTOS = {'train2017': ('astronaut', 'chelsea', 'coffee', 'motorcycle_left'), 'val2017': ('camera',)}
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # COCO's 80 categories have ids up to 90
CATEGORIES = dict(
    zip((i for i in range(1, 91) if i not in UNUSED_IDS), CocoDataset.METAINFO['classes'], strict=True),
)
# fmt: off
OBJECTS: dict[str, tuple[tuple[str, Polygon], ...]] = {
    'astronaut': (
        ('person', (
            (232, 15), (275, 25), (298, 60), (300, 95), (285, 125), (270, 130), (255, 175), (290, 195), (303, 235),
            (335, 255), (345, 290), (360, 345), (330, 362), (300, 390), (283, 430), (276, 470), (275, 511), (60, 511),
            (40, 490), (25, 450), (22, 400), (25, 340), (40, 310), (45, 285), (60, 255), (115, 205), (125, 180),
            (150, 158), (185, 150), (178, 130), (163, 112), (153, 85), (160, 50), (190, 25),
        )),
    ),
    'chelsea': (
        ('cat', (
            (38, 0), (390, 0), (385, 30), (360, 70), (362, 110), (355, 150), (330, 190), (305, 240), (290, 275),
            (260, 299), (0, 299), (0, 140), (30, 120), (35, 60),
        )),
    ),
    'coffee': (
        ('cup', (
            (173, 105), (180, 65), (205, 38), (245, 22), (290, 18), (335, 24), (375, 45), (400, 78), (405, 115),
            (398, 155), (380, 195), (360, 230), (335, 265), (300, 284), (250, 280), (225, 305), (205, 303), (197, 285),
            (212, 240), (195, 210), (180, 165),
        )),
        ('spoon', (
            (408, 68), (420, 70), (423, 80), (412, 115), (390, 195), (385, 225), (400, 250), (406, 280), (398, 305),
            (375, 322), (350, 325), (332, 310), (326, 285), (333, 262), (350, 245), (372, 240), (378, 215), (400, 150),
            (402, 100),
        )),
        ('dining table', ((150, 0), (599, 0), (599, 399), (0, 399), (0, 100))),
    ),
    'motorcycle_left': (
        ('motorcycle', (
            (92, 215), (95, 200), (140, 205), (138, 165), (150, 145), (160, 165), (230, 168), (300, 192), (355, 190),
            (385, 165), (360, 165), (395, 140), (420, 122), (460, 135), (480, 115), (495, 85), (540, 98), (525, 103),
            (555, 125), (580, 122), (580, 142), (557, 160), (545, 185), (560, 220), (575, 262), (615, 268), (640, 300),
            (668, 330), (683, 370), (683, 420), (660, 445), (620, 450), (570, 425), (530, 380), (512, 340), (505, 320),
            (512, 285), (530, 270), (505, 225), (475, 235), (475, 300), (465, 360), (430, 380), (345, 372), (340, 437),
            (325, 437), (325, 372), (285, 355), (275, 375), (240, 398), (200, 402), (160, 385), (130, 345), (122, 305),
            (130, 270), (150, 245), (112, 247),
        )),
        ('bench', (
            (50, 110), (275, 105), (280, 190), (235, 165), (160, 165), (140, 150), (138, 200), (95, 200), (92, 220),
            (110, 247), (65, 280), (62, 308), (50, 308), (42, 190),
        )),
        ('bicycle', ((0, 150), (30, 145), (45, 160), (40, 210), (20, 230), (0, 228))),
    ),
    'camera': (
        ('person', (
            (205, 63), (240, 72), (265, 100), (270, 130), (258, 140), (254, 165), (245, 195), (270, 205), (300, 175),
            (320, 170), (330, 180), (328, 205), (300, 225), (303, 270), (290, 290), (250, 312), (225, 300), (205, 290),
            (190, 330), (150, 375), (143, 400), (148, 470), (150, 511), (130, 511), (105, 440), (90, 511), (0, 511),
            (0, 245), (40, 205), (75, 150), (110, 130), (140, 105), (160, 105), (165, 85), (185, 70),
        )),
    ),
}
# fmt: on


def source() -> str:
    """Return the name and version of the package that contains the photographs."""
    try:
        return f'scikit-image=={version("scikit-image")}'
    except PackageNotFoundError as error:
        raise DatasetError('the photographs are part of scikit-image: pip install scikit-image') from error


def build(folder: Path) -> None:
    """Write the images, annotations and stuff maps of every split."""
    ids = {name: key for key, name in CATEGORIES.items()}
    for split, photos in PHOTOS.items():
        coco = CocoSplit(folder, split, CATEGORIES, prefix='instances_')
        maps = folder / 'stuffthingmaps' / split
        maps.mkdir(parents=True)
        for photo in photos:
            image = np.asarray(cv2.imread(str(files('skimage.data') / f'{photo}.png')))
            things = np.full(image.shape[:2], 255, np.uint8)
            objects = []
            # Objects are drawn in descending order of area, so that those on the table stay visible in the map.
            for name, polygon in sorted(OBJECTS[photo], key=lambda item: -cv2.contourArea(np.array(item[1]))):
                cv2.fillPoly(things, [np.array(polygon)], ids[name] - 1)
                (left, top), (right, bottom) = np.min(polygon, axis=0).tolist(), np.max(polygon, axis=0).tolist()
                objects.append(
                    {
                        'bbox': [left, top, right - left, bottom - top],
                        'category_id': ids[name],
                        'segmentation': [list(chain(*polygon))],
                    }
                )
            coco.add(image, photo, objects)
            (maps / f'{photo}.png').write_bytes(cv2.imencode('.png', things)[1].tobytes())
        coco.save(f'Photographs of scikit-image, {split}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command-line tool and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out-dir', type=Path, default=Path('data/coco_tiny'), help='the folder to write')
    args = parser.parse_args(argv)
    return run(lambda: build_folder(args.out_dir, {'converter': 'coco_tiny', 'version': 1, 'source': source()}, build))
