# SPDX-License-Identifier: Apache-2.0
"""Draw where a detector's deformable layers sample.

Each view is a picture in --out-dir:

    detections.png               all images: the boxes, and the sampling points for each box's centre
    IMAGE_points.png             the 9, 81 and 729 points that one, two and three stacked layers sample
    IMAGE_maps.png               maps of each layer's mean offset length and mean mask
    IMAGE_receptive_field.png    the layer's effective receptive field
"""

import argparse
import os
import sys
from pathlib import Path

# While other programs run, a spinning thread can occupy the core that the thread it waits for needs. torch reads the
# spin count when it is imported. See docs/performance.md, "Beside other programs".
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '3000'

from matplotlib.figure import Figure

from mmdcn.engine.launch import LaunchError, run
from mmdcn.engine.loading import load_detector
from mmdcn.utils.files import replacing
from mmdcn.visualization.drawing import draw_detections, field_figure, maps_figure, new_figure, points_figure
from mmdcn.visualization.inspection import Inspection, inspect

VIEWS = ('detections', 'points', 'maps', 'receptive_field')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='the image files')
    parser.add_argument('config', metavar='CONFIG', help='the config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='the checkpoint file, or a name of the model zoo')
    parser.add_argument('--out-dir', type=Path, default=Path('outputs'), help='the folder to write into [%(default)s]')
    parser.add_argument('--views', nargs='+', choices=VIEWS, default=VIEWS, help='what to draw [all]')
    parser.add_argument(
        '--location',
        nargs=2,
        type=float,
        action='append',
        metavar=('Y', 'X'),
        help='a location in pixels of the image; may be repeated [the centres of the three best detections]',
    )
    parser.add_argument('--layer', help="the last of the stacked layers [one that suits the best detection's size]")
    parser.add_argument('--depth', type=int, default=3, help='the maximum number of stacked layers [%(default)s]')
    parser.add_argument('--score', type=float, default=0.3, help='the minimum score of a detection [%(default)s]')
    parser.add_argument('--format', choices=['png', 'jpg'], default='png', help='the picture format [%(default)s]')
    parser.add_argument('--device', default='cpu', help='the device to run the detector on [%(default)s]')
    args = parser.parse_args()
    if args.depth < 1:
        parser.error(f'--depth must be at least 1, got {args.depth}')
    return args


def choose_layer(found: Inspection, args: argparse.Namespace) -> str:
    name = args.layer
    if name is None:
        size = found.detections[0].size if found.detections else max(found.picture.pixels.shape[:2]) / 4
        name = found.recorder.layer_for(size * found.picture.scale[0], args.depth).name
    elif name not in found.names:
        raise LaunchError(f'--layer must be one of {", ".join(found.names)}, got {name}')
    if 'receptive_field' in args.views and not name.startswith('backbone.'):
        raise LaunchError(f'--layer must be a layer of the backbone for the view receptive_field, got {name}')
    return name


def choose_locations(found: Inspection, given: list[list[float]] | None) -> list[tuple[float, float]]:
    height, width = found.picture.pixels.shape[:2]
    for y, x in given or []:
        if not (0 <= y < height and 0 <= x < width):
            raise LaunchError(f'--location must be inside the image of {height} x {width} pixels, got {y:g} {x:g}')
    centres = [detection.centre for detection in found.detections[:3]]
    return [(y, x) for y, x in given or []] or centres or [(height / 2, width / 2)]


def draw_all_detections(inspections: list[Inspection], depth: int) -> Figure:
    columns = min(4, len(inspections))
    rows = -(-len(inspections) // columns)
    title = 'Detections, and where the deformable layers sample (+ centre; darker is heavier)'
    figure, axes = new_figure(rows, columns, inspections[0].picture.pixels, title, width=3.2)
    for ax in axes.flat:
        ax.set_axis_off()
    for found, ax in zip(inspections, axes.flat, strict=False):
        draw_detections(ax, found.picture, found.recorder, found.detections, depth)
    return figure


def draw_view(view: str, found: Inspection, layer: str, locations: list[tuple[float, float]], depth: int) -> Figure:
    if view == 'maps':
        return maps_figure(found.picture, found.recorder)
    if view == 'points':
        return points_figure(found.picture, found.recorder, layer, locations, depth)
    fields = [found.field(found.recorder.layer(layer), *location) for location in locations]
    return field_figure(found.picture, fields, locations, layer)


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside)
    print(f'wrote {path}')


def main() -> None:
    args = parse_args()
    model = load_detector(args.config, args.checkpoint, args.device)
    inspections = [inspect(model, image, args.score) for image in args.images]
    choices = [(choose_layer(found, args), choose_locations(found, args.location)) for found in inspections]
    if 'detections' in args.views:
        save(draw_all_detections(inspections, min(args.depth, 2)), args.out_dir / f'detections.{args.format}')
    for image, found, choice in zip(args.images, inspections, choices, strict=True):
        for view in args.views:
            if view != 'detections':
                figure = draw_view(view, found, *choice, args.depth)
                save(figure, args.out_dir / f'{Path(image).stem}_{view}.{args.format}')


if __name__ == '__main__':
    sys.exit(run(main))
