# SPDX-License-Identifier: Apache-2.0
"""Print the results of `make gpu-check` as one page: goals, steps, failures, tables."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run import Results, chart, load, report
from tabulate import tabulate

Record = dict[str, Any]
BASELINES = {'deform_conv2d': 'conv2d', 'deform_roi_pool': 'roi_align', 'resnet': 'plain'}
FORWARD, TRAINING = 'forward', 'forward + backward'
CONV, MMDCN, PEER = 'conv2d channels_last', 'mmdcn channels_last', 'torchvision'
FAILURES = 25  # maximum number of failures shown for each step


@dataclass
class Goal:
    """A figure for each case, and a bound for their geometric mean, or for each of them."""

    text: str
    figures: Callable[[dict[str, Results]], list[float]]
    most: float = math.inf
    least: float = 0.0
    each: bool = False

    def row(self, groups: dict[str, Results]) -> list[str]:
        figures = self.figures(groups)
        wanted = f'>= {self.least:g}' if self.least else f'<= {self.most:g}'
        if not figures:
            return [self.text, wanted, 'not run', '']
        mean = math.prod(figures) ** (1 / len(figures))
        met = all(self.least <= f <= self.most for f in (figures if self.each else [mean]))
        cells = ', '.join(f'{f:.3g}' for f in figures)
        seen = cells if self.each or len(figures) == 1 else f'{mean:.3g} ({cells})'
        return [self.text, wanted, seen, 'met' if met else '**not met**']


def ratios(group: str, mode: str, above: str, below: str) -> Callable[[dict[str, Results]], list[float]]:
    """Return, for each case that has both, the time of one candidate over that of another."""

    def figures(groups: dict[str, Results]) -> list[float]:
        rows = groups.get(group, {}).get(mode, {}).values()
        return [row[above].median / row[below].median for row in rows if above in row and below in row]

    return figures


def memory(candidate: str) -> Callable[[dict[str, Results]], list[float]]:
    """Return the peak MiB of a candidate's forward at c3 in fp16, without inputs and output."""

    def figures(groups: dict[str, Results]) -> list[float]:
        rows = groups.get('deform_conv2d-fp16', {}).get(FORWARD, {})
        found = [row[candidate].peak_bytes for case, row in rows.items() if case.startswith('c3') and candidate in row]
        return [peak / 2**20 for peak in found if peak is not None]

    return figures


C = 'deform_conv2d-'
R = 'deform_roi_pool-levels'
ALIGN, POOL = 'roi_align of torchvision', 'mmdcn'
GOALS = (
    Goal('bf16 forward / cuDNN, channels_last, c3-c5, batch 16', ratios(C + 'bf16', FORWARD, MMDCN, CONV), most=2),
    Goal('the same, new kernels', ratios(C + 'new', FORWARD, f'{MMDCN}, new kernels', CONV), most=2),
    Goal('bf16 forward + backward / cuDNN', ratios(C + 'bf16', TRAINING, MMDCN, CONV), most=3.5),
    Goal('the same, new kernels', ratios(C + 'new', TRAINING, f'{MMDCN}, new kernels', CONV), most=3.5),
    Goal('torchvision / mmdcn, fp16 forward', ratios(C + 'fp16', FORWARD, PEER, MMDCN), least=5),
    Goal('torchvision / mmdcn, fp16 forward + backward', ratios(C + 'fp16', TRAINING, PEER, MMDCN), least=8),
    Goal(
        'deformops / mmdcn, bf16 forward, each shape',
        ratios(C + 'deformops', FORWARD, 'deformops', MMDCN),
        least=1,
        each=True,
    ),
    Goal(
        'deformops / mmdcn, bf16 forward + backward, each shape',
        ratios(C + 'deformops', TRAINING, 'deformops', MMDCN),
        least=1,
        each=True,
    ),
    Goal("torchvision / mmdcn, fp32, torch's TF32, forward", ratios(C + 'stages', FORWARD, PEER, MMDCN), least=2),
    Goal('torchvision / mmdcn, fp32, forward + backward', ratios(C + 'stages', TRAINING, PEER, MMDCN), least=4),
    Goal(
        'ResNet-50 DCNv2 step, AMP, channels_last / plain',
        ratios('resnet', 'training step', 'mmdcn', 'plain'),
        most=1.3,
    ),
    Goal('torchvision / mmdcn, fp16 batch 1 forward, wall', ratios(C + 'batch-1', FORWARD, PEER, MMDCN), least=3),
    Goal('the same, new kernels', ratios(C + 'new-batch-1', FORWARD, PEER, f'{MMDCN}, new kernels'), least=3),
    Goal("RoI pooling / torchvision's RoIAlign, NCHW, forward", ratios(R, FORWARD, POOL, ALIGN), most=0.7),
    Goal("RoI pooling / torchvision's RoIAlign, forward + backward", ratios(R, TRAINING, POOL, ALIGN), most=0.6),
    Goal(
        'deterministic / default, bf16 forward + backward',
        ratios(C + 'bf16', TRAINING, f'{MMDCN}, deterministic', MMDCN),
        most=2,
    ),
    Goal('memory beside the output, fp16 c3, NCHW forward, MiB', memory('mmdcn'), most=64),
    Goal('memory beside the output, channels_last, MiB', memory(MMDCN), most=25),
)


def loaded(record: Record) -> dict[str, Results]:
    """Return the results of a record by operator and group, without device and threads in the names."""
    return {stem.partition('-cuda')[0]: load(group) for stem, group in record['groups'].items()}


def page(record: Record) -> str:
    parts = [summary(record), '## Tables\n']
    for stem, group in record['groups'].items():
        parts.append(report(load(group), stem, BASELINES[stem.partition('-')[0]]))
        parts += [f'Without {name}: {reason}\n' for name, reason in group['skipped'].items()]
    return '\n'.join(parts)


def summary(record: Record) -> str:
    parts = [
        f'# mmdcn {record["commit"]} on a GPU\n',
        f'{record["seconds"]:.0f} s in all.\n',
        facts(record),
        '## Goals\n',
        goals_table(record),
        '\nFor several shapes the geometric mean must meet the goal; the figures of the shapes follow it.\n',
    ]
    if record['steps']:
        parts += ['## Steps\n', steps_table(record['steps']), '', *filter(None, map(failures, record['steps']))]
    return '\n'.join(parts)


def goals_table(record: Record) -> str:
    lines = [goal.row(loaded(record)) for goal in GOALS]
    return tabulate(lines, headers=['figure', 'goal', 'seen', ''], tablefmt='github', disable_numparse=True)


def facts(record: Record) -> str:
    """Return a table of the machine, from the first group that has one."""
    for group in record['groups'].values():
        known = {key: value for key, value in group['machine'].items() if value != 'not installed' and key != 'clock'}
        return tabulate(known.items(), headers=['', ''], tablefmt='github') + '\n'
    return ''


def steps_table(steps: list[dict[str, Any]]) -> str:
    lines = [
        [
            step['name'],
            step['status'],
            f'{step["seconds"]:.1f}',
            ', '.join(f'{n} {k}' for k, n in step['counts'].items()),
        ]
        for step in steps
    ]
    return tabulate(lines, headers=['step', '', 'seconds', ''], tablefmt='github', disable_numparse=True)


def failures(step: dict[str, Any]) -> str:
    lines = [f'- `{failure}`' for failure in step['failures'][:FAILURES]]
    if len(step['failures']) > FAILURES:
        lines.append(f'- and {len(step["failures"]) - FAILURES} more')
    if step['tail']:
        lines += ['', '```', *step['tail'], '```']
    return '\n'.join([f'{step["name"]}:\n', *lines, '']) if lines else ''


def combined_charts(record: Record, folder: Path) -> None:
    """Draw one chart for each operator, with a row of plots for each group."""
    groups = loaded(record)
    for operator, baseline in BASELINES.items():
        mine = {stem.removeprefix(f'{operator}-'): group for stem, group in groups.items() if stem.startswith(operator)}
        if mine and operator != 'resnet':
            chart(mine, baseline, f'{operator}, {record["commit"]}', folder / f'gpu-check-{operator}.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('record', type=Path, help='gpu-check.json')
    parser.add_argument('--charts', type=Path, help='folder for charts')
    args = parser.parse_args()
    record = json.loads(args.record.read_text())
    print(page(record))
    if args.charts:
        combined_charts(record, args.charts)


if __name__ == '__main__':
    main()
