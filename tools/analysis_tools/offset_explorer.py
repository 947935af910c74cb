# SPDX-License-Identifier: Apache-2.0
"""Write an HTML page that shows where each deformable layer samples for the location under the pointer."""

import argparse
import sys
from pathlib import Path

from mmdcn.engine.launch import run
from mmdcn.engine.loading import load_detector
from mmdcn.utils.files import replacing
from mmdcn.visualization.explorer import explorer_page
from mmdcn.visualization.inspection import inspect


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('image', metavar='IMAGE', help='the image file')
    parser.add_argument('config', metavar='CONFIG', help='the config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='the checkpoint file, or a name of the model zoo')
    parser.add_argument('--out', type=Path, default=Path('outputs/offset_explorer.html'), help='the page to write')
    parser.add_argument('--title', help="the page's title; by default the name of the image")
    parser.add_argument('--score', type=float, default=0.3, help='the minimum score of a detection')
    parser.add_argument('--device', default='cpu', help='the device to run the detector on')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = load_detector(args.config, args.checkpoint, args.device)
    found = inspect(model, args.image, args.score)
    title = args.title or Path(args.image).name
    page = explorer_page(found.picture, found.recorder, found.detections, title, Path(args.config).stem)
    with replacing(args.out) as beside:
        beside.write_text(page, encoding='utf-8')
    print(f'wrote {args.out}, {len(page) / 1e6:.1f} MB')


if __name__ == '__main__':
    sys.exit(run(main))
