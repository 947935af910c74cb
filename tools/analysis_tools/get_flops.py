# SPDX-License-Identifier: Apache-2.0
"""Print each layer's multiply-adds, parameters and activations."""

import argparse
import sys

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich import box
from rich.console import Console
from rich.table import Table

from mmdcn.engine.launch import LaunchError, Options, explained, load_config, run
from mmdcn.visualization.complexity import DetectorComplexity, detector_complexity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='the config file')
    parser.add_argument(
        '--shape', type=int, nargs=2, metavar=('H', 'W'), help="the size of the image [the config's test scale]"
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=Options, metavar='KEY=VALUE', help="settings that replace the config's"
    )
    args = parser.parse_args()
    if args.shape is not None and min(args.shape) < 1:
        parser.error(f'--shape must be at least 1 x 1, got {args.shape[0]} x {args.shape[1]}')
    return args


def test_scale(cfg: Config) -> tuple[int, int]:
    """Return the height and width of the largest image that a config's test pipeline produces.

    Raises:
        LaunchError: If the config has no such pipeline.
    """
    for transform in cfg.get('test_pipeline', []):
        if transform.type.endswith('Resize') and 'scale' in transform:
            width, height = transform.scale
            return height, width
    raise LaunchError("the config's test_pipeline does not resize images: pass --shape H W")


def print_table(found: DetectorComplexity) -> None:
    table = Table('layer', 'class', box=box.MARKDOWN)
    for title in ('parameters', 'activations', 'multiply-adds', "torch's FLOPs"):
        table.add_column(title, justify='right')
    for layer in found.layers:
        figures = (layer.parameters, layer.activations, layer.flops, layer.flops_of_torch)
        table.add_row(layer.name, layer.kind, *(f'{figure:,}' for figure in figures))
    totals = [found.total(what) for what in ('parameters', 'activations', 'flops', 'flops_of_torch')]
    table.add_row('all', '', *(f'{total:,}' for total in totals))
    Console(width=160).print(table)
    print(
        "\nMultiply-adds are mmengine's count, normalizations included. torch.utils.flop_counter counts two operations "
        "for each\nmultiply-add of convolutions, linear layers and mmdcn's operators, and nothing else."
    )
    if found.uncounted:
        calls = ', '.join(f'{name} ({count})' for name, count in sorted(found.uncounted.items()))
        print(f'\nNot counted: {calls}')


def main() -> None:
    args = parse_args()
    args.launcher, args.work_dir, args.local_rank = 'none', None, 0
    cfg = load_config(args)
    shape = args.shape or test_scale(cfg)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    torch.manual_seed(0)
    with explained(cfg):
        model = MODELS.build(cfg.model)
    print(f'{args.config} on one image of {shape[0]} x {shape[1]} pixels\n')
    print_table(detector_complexity(model, *shape))


if __name__ == '__main__':
    sys.exit(run(main))
