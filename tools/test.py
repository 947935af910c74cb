# SPDX-License-Identifier: Apache-2.0
"""Test a checkpoint of a detector, and print its average precision."""

import argparse
import os
import sys
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

# While other programs run, a spinning thread can occupy the core that the thread it waits for needs. torch reads the
# spin count when it is imported. See docs/performance.md, "Beside other programs".
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '3000'

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_rank
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mmdcn.engine.launch import (
    add_arguments,
    build_runner,
    explained,
    load_config,
    run,
)
from mmdcn.engine.loading import check_fits, find_checkpoint
from mmdcn.utils.files import replacing


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config file')
    parser.add_argument('checkpoint', help='the checkpoint file, or a name of the model zoo')
    add_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the detections to this file')
    parser.add_argument('--show', action='store_true', help='show each image with its detections')
    parser.add_argument(
        '--show-dir',
        help='write each image with its detections into this folder of the work folder',
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each image for [%(default)s]')
    parser.add_argument('--tta', action='store_true', help="average over flips, or over the config's tta_pipeline")
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end with .pkl or .pickle, got {args.out}')
    return args


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation; settings that the config lacks are mmdet's defaults."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        nms = dict(type='nms', iou_threshold=0.5)
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
    if 'tta_pipeline' not in cfg:
        *loading, pack = deepcopy(dataset.pipeline)
        keys = (*pack.get('meta_keys', ()), 'flip', 'flip_direction')
        flips = [dict(type='mmdet.RandomFlip', prob=1.0), dict(type='mmdet.RandomFlip', prob=0.0)]
        packs = [dict(pack, meta_keys=keys)]
        cfg.tta_pipeline = [*loading, dict(type='TestTimeAug', transforms=[flips, packs])]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def print_table(metrics: dict[str, float]) -> None:
    """Print the metrics so that they can be pasted into a page."""
    table = Table('metric', 'value', box=box.MARKDOWN)
    for name, value in metrics.items():
        table.add_row(name, f'{value:.3f}')
    Console(width=100).print(table)


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = find_checkpoint(args.checkpoint)
    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)
    if args.tta:
        use_tta(cfg)
    with explained(cfg), ExitStack() as stack:
        runner = build_runner(cfg, 'test')
        if isinstance(runner.model, nn.Module):  # a FlexibleRunner builds its model later
            check_fits(runner.model, cfg.load_from)
        if args.out is not None:
            out = stack.enter_context(replacing(Path(args.out)))
            runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(out)))
        metrics = runner.test()
    if get_rank() == 0:
        print_table(metrics)


if __name__ == '__main__':
    sys.exit(run(main))
