# SPDX-License-Identifier: Apache-2.0
"""Time a training iteration of the demo's detector with and without DCNv2, alone and beside two busy loops.

This needs the demo's dataset: python tools/dataset_converters/mnist_scenes.py
"""

import argparse
import os
from functools import partial
from pathlib import Path

# As in tools/train.py.
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '3000'

import torch
from measure import Call, busy_loops, machine, measure
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from run import table

CONFIGS = Path(__file__).parents[1] / 'configs/mnist_scenes'
BASELINE = 'conv'
DETECTORS = {
    BASELINE: 'faster-rcnn_r18-w32_fpn_6e_mnist-scenes.py',
    'mmdcn DCNv2': 'faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py',
}


def training_iteration(config: Path) -> Call:
    """Build a training step on the first batch of the dataset; its tiny learning rate hardly changes the model."""
    cfg = Config.fromfile(config)
    cfg.optim_wrapper.optimizer.lr = 1e-6
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    return partial(model.train_step, batch, build_optim_wrapper(model, cfg.optim_wrapper))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--repeats', type=int, default=7, help='the number of timings of each detector')
    args = parser.parse_args()
    MMLogger.get_instance('demo', log_level='ERROR')  # otherwise mmengine logs a line for each parameter
    register_all_modules()
    facts = machine('cpu', ('torch', 'mmdcn', 'onedl-mmcv', 'onedl-mmdetection'))
    print('\n'.join(f'{key}: {value}' for key, value in facts.items()), flush=True)
    calls = {name: training_iteration(CONFIGS / config) for name, config in DETECTORS.items()}
    rows = {}
    for name, loops in (('alone', 0), ('beside two busy loops', 2)):
        with busy_loops(loops):
            rows[name] = measure(calls, 'cpu', args.repeats, memory=False)
    print(f'\nA training iteration / {BASELINE}\n\n{table(rows, BASELINE)}\n')
    for name in calls:
        alone, busy = (row[name].median for row in rows.values())
        print(f'{name}, beside two busy loops / alone: {busy / alone:.2f}')


if __name__ == '__main__':
    main()
