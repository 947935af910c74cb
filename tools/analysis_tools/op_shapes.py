# SPDX-License-Identifier: Apache-2.0
"""Print the shape of every tensor in the forward and backward pass of a deformable layer."""

import argparse
import sys
from typing import Any

import torch
from mmcv.cnn import build_conv_layer
from rich import box
from rich.console import Console
from rich.table import Table

from mmdcn.engine.launch import LaunchError, run
from mmdcn.visualization.shapes import steps_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--layer', default='mmdcn.DCNv2', choices=['mmdcn.DCN', 'mmdcn.DCNv2'], help='the layer')
    parser.add_argument('--batch', type=int, default=2, help='images, B')
    parser.add_argument('--in-channels', type=int, default=8, help='channels of the input, C_in')
    parser.add_argument('--out-channels', type=int, default=16, help='channels of the output, C_out')
    parser.add_argument('--size', type=int, nargs=2, default=(10, 14), metavar=('H', 'W'), help='size of the input')
    parser.add_argument('--kernel', type=int, default=3, help='size of the kernel, kh = kw')
    parser.add_argument('--stride', type=int, default=1)
    parser.add_argument('--padding', type=int, default=1)
    parser.add_argument('--dilation', type=int, default=1)
    parser.add_argument('--deform-groups', type=int, default=1, help='offset groups, G')
    return parser.parse_args()


def build_layer(args: argparse.Namespace) -> Any:
    try:
        layer = build_conv_layer(
            dict(type=args.layer, deform_groups=args.deform_groups), args.in_channels, args.out_channels, args.kernel,
            args.stride, args.padding, args.dilation,
        )  # fmt: skip
    except (AssertionError, ValueError) as error:
        raise LaunchError(str(error)) from error
    with torch.no_grad():  # a new layer's offsets are zero
        layer.conv_offset.bias.uniform_(-1, 1)
    return layer


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    layer = build_layer(args)
    try:
        steps = steps_of(layer, torch.randn(args.batch, args.in_channels, *args.size))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(str(error)) from error
    table = Table('tensor', 'axes', 'shape', 'numbers', box=box.MARKDOWN)
    for step in steps:
        table.add_row(
            step.name,
            f'[{step.axes}]'.replace('[', r'\['),
            r'\[' + str(list(step.value.shape))[1:],
            f'{step.value.numel():,}',
        )
    print(layer)
    Console(width=120).print(table)


if __name__ == '__main__':
    sys.exit(run(main))
