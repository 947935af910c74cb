# SPDX-License-Identifier: Apache-2.0
"""Compare an exported detector with its original: average precision, and differences of the detections."""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.structures import InstanceData
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mmdcn import deployment
from mmdcn.engine.launch import LaunchError, add_arguments, build_runner, explained, load_config, run
from mmdcn.engine.loading import check_fits, find_checkpoint

TOLERANCE = 1e-4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config file')
    parser.add_argument('checkpoint', help='the checkpoint file, or a name of the model zoo')
    parser.add_argument('exported', help='the exported detector, .onnx or .pt2')
    add_arguments(parser)
    return parser.parse_args()


class Recorder(nn.Module):
    """A detector that records its detections."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector, self.found = detector, {}

    def test_step(self, data: dict) -> list:
        samples = self.detector.test_step(data)
        self.found |= {sample.img_id: sample.pred_instances.cpu() for sample in samples}
        return samples


def print_table(metrics: list[dict[str, float]], found: list[dict[int, InstanceData]]) -> None:
    table = Table('metric', 'PyTorch', 'exported', box=box.MARKDOWN)
    for name, value in metrics[0].items():
        table.add_row(name, f'{value:.3f}', f'{metrics[1][name]:.3f}')
    apart = torch.cat([deployment.distances(found[0][image], found[1][image]) for image in found[0]])
    close = apart <= TOLERANCE
    table.add_row('detections', *(str(sum(map(len, each.values()))) for each in found))
    table.add_row(f'without a match within {TOLERANCE}', '', str(int((~close).sum())))
    table.add_row('largest difference of a coordinate or a score', '', f'{apart.max():.1e}')
    Console(width=120).print(table)
    if not close.all():
        raise LaunchError('the detections differ: export the detector from this config and checkpoint')


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = find_checkpoint(args.checkpoint)
    if not Path(args.exported).is_file():
        raise LaunchError(f'{args.exported} does not exist; tools/deployment/export_onnx.py makes such a file')
    try:
        detect = deployment.load(args.exported)
    except Exception as error:  # each format has errors of its own
        raise LaunchError(f'{args.exported} cannot be loaded: {error}') from error
    with explained(cfg):
        runner = build_runner(cfg, 'test')
        check_fits(runner.model, cfg.load_from)
        runner.load_or_resume()  # before the model is wrapped, which changes its keys
        detector = runner.model
        metrics, found = [], []
        for model in (detector, deployment.ExportedDetector(detector.data_preprocessor, detect)):
            runner.model = Recorder(model)
            metrics.append(runner.test())
            found.append(runner.model.found)
    print_table(metrics, found)


if __name__ == '__main__':
    sys.exit(run(main))
