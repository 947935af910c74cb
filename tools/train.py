# SPDX-License-Identifier: Apache-2.0
"""Train a detector from a config."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# While other programs run, a spinning thread can occupy the core that the thread it waits for needs. torch reads the
# spin count when it is imported. See docs/performance.md, "Beside other programs".
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '3000'

from mmengine.config import Config
from mmengine.runner import Runner

from mmdcn.engine.launch import (
    LaunchError,
    add_arguments,
    build_runner,
    explained,
    load_config,
    mend_last_checkpoint,
    run,
)
from mmdcn.engine.loading import check_resumable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config file')
    add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision; on a CPU in bfloat16')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's auto_scale_lr.base_batch_size to the actual batch size",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from a checkpoint, by default the last one in the work folder, if there is any',
    )
    return parser.parse_args()


def apply_arguments(cfg: Config, args: argparse.Namespace) -> None:
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise LaunchError(
                '--auto-scale-lr needs the batch size for which the learning rate was chosen: '
                'set auto_scale_lr.base_batch_size in the config'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
        mend_last_checkpoint(Path(cfg.work_dir))
        if cfg.load_from is not None and not Path(cfg.load_from).is_dir():  # DeepSpeed writes folders
            check_resumable(cfg.load_from)


@contextmanager
def classes_explained(runner: Runner) -> Iterator[None]:
    """Name the heads that have too few classes for the data, after an error of a label that they do not have.

    Raises:
        LaunchError: Instead of such an error.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if not re.search('Class values must be smaller|Target .* is out of bounds|device-side assert', str(error)):
            raise
        classes = runner.train_dataloader.dataset.metainfo.get('classes') or ()
        heads = {name.removeprefix('module.'): module for name, module in runner.model.named_modules()}
        counts = {
            name: getattr(head, 'num_classes', None) or 0 for name, head in heads.items() if 'rpn_head' not in name
        }
        few = [f'model.{name}.num_classes={count}' for name, count in counts.items() if 0 < count < len(classes)]
        if not few:
            raise
        raise LaunchError(
            f'the training data has {len(classes)} classes, but the config has {" and ".join(few)}'
        ) from error


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    with explained(cfg):
        apply_arguments(cfg, args)
        runner = build_runner(cfg, 'train', 'val')
        with classes_explained(runner):
            runner.train()


if __name__ == '__main__':
    sys.exit(run(main))
