# SPDX-License-Identifier: Apache-2.0
"""Compare an operator with other implementations, such as: python benchmarks/run.py deform_conv2d."""

import argparse
import gc
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from measure import Call, Measurement, busy_loops, machine, measure
from tabulate import tabulate
from tqdm import tqdm

Row = dict[str, Measurement]
Results = dict[str, dict[str, Row]]  # by mode and case


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('operator', choices=['deform_conv2d', 'deform_roi_pool', 'nms'], help='the operator to measure')
    parser.add_argument('--cases', nargs='+', default=[], help='groups of shapes, or "all"; by default the first group')
    parser.add_argument('--candidates', nargs='+', metavar='NAME', help='measure only names that begin with these')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='the number of CPU threads')
    parser.add_argument('--repeats', type=int, default=7, help='the number of timings of each candidate')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for results')
    parser.add_argument('--stored', type=Path, nargs='+', help='print and plot these results, and measure nothing')
    return parser.parse_args()


def usable(candidates: dict[str, Callable[[], Call]], skipped: dict[str, str]) -> dict[str, Call]:
    """Build and run each candidate once, and record the reason if it cannot run."""
    calls = {}
    for name, build in candidates.items():
        try:
            calls[name] = build()
            calls[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # reports errors of the kernels here
        except (ImportError, NotImplementedError, RuntimeError) as error:
            calls.pop(name, None)
            skipped.setdefault(name, f'{type(error).__name__}: {error}'.splitlines()[0][:200])
    return calls


def base_of(row: Row, baseline: str) -> float:
    """Return the median time of the baseline in its faster layout."""
    return min((m.median for name, m in row.items() if name.startswith(baseline)), default=math.nan)


def table(rows: dict[str, Row], baseline: str) -> str:
    """Format the times relative to the faster layout of the baseline, with their geometric means in the last row."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = []
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for case, row in rows.items():
        base = base_of(row, baseline)
        cells = [case]
        for name in names:
            if name not in row:
                cells.append('')
                continue
            ratios[name].append(row[name].median / base)
            milliseconds = row[name].median * 1e3
            digits = 1 if milliseconds >= 10 else 2 if milliseconds >= 1 else 3
            spread = f' ±{row[name].spread:.0%}' if len(row[name].seconds) > 1 else ''
            cells.append(f'{ratios[name][-1]:.2f} ({milliseconds:.{digits}f} ms{spread})')
        lines.append(cells)
    complete = {name: values for name, values in ratios.items() if len(values) == len(rows)}
    means = [f'{math.prod(complete[n]) ** (1 / len(rows)):.2f}' if n in complete else '' for n in names]
    lines.append(['geometric mean', *means])
    return tabulate(lines, headers=['', *names], tablefmt='github', disable_numparse=True)


def memory_table(rows: dict[str, Row]) -> str:
    """Format the peaks in MiB; an empty string if there are none."""
    names = list(dict.fromkeys(name for row in rows.values() for name, m in row.items() if m.peak_bytes is not None))
    if not names:
        return ''

    def cell(row: Row, name: str) -> str:
        known = name in row and row[name].peak_bytes is not None
        return f'{row[name].peak_bytes / 2**20:.0f}' if known else ''

    lines = [[case, *(cell(row, name) for name in names)] for case, row in rows.items()]
    return tabulate(lines, headers=['peak MiB', *names], tablefmt='github', disable_numparse=True)


def report(results: Results, title: str, baseline: str) -> str:
    """Format both tables of each mode that has results."""
    parts = []
    for mode, rows in results.items():
        if rows:
            parts += [f'{title}, {mode}: time / {baseline}\n', f'{table(rows, baseline)}\n', f'{memory_table(rows)}\n']
    return '\n'.join(parts)


def chart(groups: dict[str, Results], baseline: str, title: str, path: Path) -> None:
    """Draw a row of plots for each group of cases, and a column for each mode."""
    columns = max(len(results) for results in groups.values())
    size = (7 * columns, 4.5 * len(groups))
    all_rows = [row for results in groups.values() for rows in results.values() for row in rows.values()]
    names = dict.fromkeys(name for row in all_rows for name in row)
    colors = dict(zip(names, cycle(plt.get_cmap('tab20').colors), strict=False))
    figure, grid = plt.subplots(len(groups), columns, figsize=size, squeeze=False, layout='constrained')
    for axes, (group, results) in zip(grid, groups.items(), strict=True):
        for ax, (mode, rows) in zip(axes, results.items(), strict=False):
            bars(ax, rows, baseline, colors)
            ax.set_title(f'{group}, {mode}')
    figure.suptitle(title)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=patches, loc='outside lower center', ncols=5, fontsize=7)
    figure.savefig(path, dpi=120 if len(groups) == 1 else 60)
    plt.close(figure)


def bars(ax: plt.Axes, rows: dict[str, Row], baseline: str, colors: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for i, name in enumerate(names):
        heights = [row[name].median / base_of(row, baseline) if name in row else 0 for row in rows.values()]
        places = [j + i * 0.8 / len(names) for j in range(len(rows))]
        drawn = ax.bar(places, heights, 0.8 / len(names), color=colors[name])
        ax.bar_label(drawn, [f'{h:.2g}' if h else '' for h in heights], fontsize=6, rotation=90, padding=2)
    slant = dict(rotation=30, ha='right', rotation_mode='anchor', fontsize=8) if len(rows) > 4 else {}
    ax.set_xticks([j + 0.4 for j in range(len(rows))], list(rows), **slant)
    ax.set_yscale('log')
    ax.axhline(1, color='black', lw=0.8)
    ax.set_ylim(top=ax.get_ylim()[1] * 2)
    ax.set_ylabel(f'time / {baseline} (log)')


def load(record: dict[str, Any]) -> Results:
    """Return the measurements from a file of `write`."""
    return {
        mode: {case: {name: Measurement(**m) for name, m in row.items()} for case, row in rows.items()}
        for mode, rows in record['results'].items()
    }


def write(facts: dict[str, str], results: Results, skipped: dict[str, str], path: Path) -> None:
    """Replace the file atomically, so that an interrupted run leaves the last complete one."""
    stored = {
        mode: {case: {name: vars(m) for name, m in row.items()} for case, row in rows.items()}
        for mode, rows in results.items()
    }
    part = path.with_suffix('.part')
    part.write_text(json.dumps({'machine': facts, 'skipped': skipped, 'results': stored}, indent=1))
    part.replace(path)


def measure_group(
    operator: ModuleType, group: str, args: argparse.Namespace, facts: dict[str, str], path: Path
) -> dict[str, str]:
    """Measure every mode and case of a group, write the file, and return the skipped candidates with the reasons."""
    modes = {'forward': operator.forward_candidates}
    if hasattr(operator, 'training_candidates'):
        modes['forward + backward'] = operator.training_candidates
    results: Results = {mode: {} for mode in modes}
    skipped: dict[str, str] = {}
    wall = args.device == 'cpu' or group in operator.WALL_GROUPS
    facts = {**facts, 'clock': "the host's" if wall else "the GPU's"}
    work = [(mode, case) for mode in modes for case in operator.CASES[args.device][group]]
    for mode, case in tqdm(work, desc=group, unit='case'):
        builds = modes[mode](case, args.device)
        wanted = tuple(args.candidates or builds)
        calls = usable({name: build for name, build in builds.items() if name.startswith(wanted)}, skipped)
        with busy_loops(2 if group == 'busy' else 0):
            results[mode][case.name] = measure(calls, args.device, args.repeats, wall=wall)
        write(facts, results, skipped, path)
    print(f'\n{report(results, args.operator, operator.BASELINE)}', flush=True)
    for name, reason in skipped.items():
        print(f'skipped {name}: {reason}', flush=True)
    return skipped


def main() -> None:
    args = parse_args()
    operator = importlib.import_module(args.operator)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.stored or []:
        results = load(json.loads(path.read_text()))
        print(report(results, path.stem, operator.BASELINE))
        chart({path.stem: results}, operator.BASELINE, args.operator, args.out / f'{path.stem}.png')
    if args.stored:
        return
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS needs this for deterministic sums
    torch.set_num_threads(args.threads)
    gc.freeze()  # so that gc.collect before each memory measurement skips imported objects
    torch.backends.cudnn.benchmark = True  # as users run plain convolutions
    cases = operator.CASES[args.device]
    groups = list(cases) if args.cases == ['all'] else args.cases or list(cases)[:1]
    facts = machine(args.device, operator.PACKAGES)
    print(tabulate(facts.items(), tablefmt='github'), flush=True)
    skipped: dict[str, str] = {}
    for group in groups:
        name = f'{args.operator}-{group}-{args.device}-{args.threads}'
        path = args.out / f'{name}.json'
        skipped |= measure_group(operator, group, args, facts, path)
        results = load(json.loads(path.read_text()))
        chart({group: results}, operator.BASELINE, args.operator, path.with_suffix('.png'))
    if any(name.startswith('mmdcn') for name in skipped):
        sys.exit('mmdcn itself could not run, see above')


if __name__ == '__main__':
    main()
