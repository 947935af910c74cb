# SPDX-License-Identifier: Apache-2.0
"""Compare an operator with everything else that computes it: python benchmarks/run.py deform_conv2d."""

import argparse
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from measure import Call, Measurement, machine, measure
from tabulate import tabulate
from tqdm import tqdm

Row = dict[str, Measurement]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('operator', choices=['deform_conv2d', 'deform_roi_pool'], help='what to measure')
    parser.add_argument('--cases', nargs='+', default=[], help='groups of shapes, or "all"; none: the first group')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='on the CPU')
    parser.add_argument('--repeats', type=int, default=7, help='how often each candidate is timed')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for results')
    return parser.parse_args()


def usable(candidates: dict[str, Callable[[], Call]], skipped: dict[str, str]) -> dict[str, Call]:
    """Build and try each candidate once, and note why one cannot run."""
    calls = {}
    for name, build in candidates.items():
        try:
            calls[name] = build()
            calls[name]()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            calls.pop(name, None)
            skipped[name] = str(error).splitlines()[0][:100]
    return calls


def table(rows: dict[str, Row], baseline: str) -> str:
    """Give ratios to the better of the baseline's layouts, geometric means last, and milliseconds."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = []
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for case, row in rows.items():
        base = min(m.median for name, m in row.items() if name.startswith(baseline))
        cells = [case]
        for name in names:
            if name not in row:
                cells.append('')
                continue
            ratios[name].append(row[name].median / base)
            cells.append(f'{ratios[name][-1]:.2f} ({row[name].median * 1e3:.1f} ms ±{row[name].spread:.0%})')
        lines.append(cells)
    complete = {name: values for name, values in ratios.items() if len(values) == len(rows)}
    means = [f'{math.prod(complete[n]) ** (1 / len(rows)):.2f}' if n in complete else '' for n in names]
    lines.append(['geometric mean', *means])
    return tabulate(lines, headers=['', *names], tablefmt='github', disable_numparse=True)


def memory_table(rows: dict[str, Row]) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))

    def cell(row: Row, name: str) -> str:
        known = name in row and row[name].peak_bytes is not None
        return f'{row[name].peak_bytes / 2**20:.0f}' if known else ''

    lines = [[case, *(cell(row, name) for name in names)] for case, row in rows.items()]
    return tabulate(lines, headers=['peak MiB', *names], tablefmt='github', disable_numparse=True)


def chart(results: dict[str, dict[str, Row]], baseline: str, title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(7 * len(results), 4.5), squeeze=False)
    for ax, (mode, rows) in zip(axes.flat, results.items(), strict=True):
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        for i, name in enumerate(names):
            heights = []
            for row in rows.values():
                base = min(m.median for n, m in row.items() if n.startswith(baseline))
                heights.append(row[name].median / base if name in row else 0)
            places = [j + i * 0.8 / len(names) for j in range(len(rows))]
            bars = ax.bar(places, heights, 0.8 / len(names), label=name)
            ax.bar_label(bars, [f'{h:.2g}' if h else '' for h in heights], fontsize=6, rotation=90, padding=2)
        ax.set_xticks([j + 0.4 for j in range(len(rows))], list(rows))
        ax.set_yscale('log')
        ax.axhline(1, color='black', lw=0.8)
        ax.set_ylim(top=ax.get_ylim()[1] * 2)
        ax.set_title(mode)
        ax.set_ylabel(f'time / {baseline} (log)')
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    operator = importlib.import_module(args.operator)
    cases = operator.CASES[args.device]
    groups = list(cases) if args.cases == ['all'] else args.cases or list(cases)[:1]
    facts = machine(args.device, operator.PACKAGES)
    print(tabulate(facts.items(), tablefmt='github'), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    modes = {'forward': operator.forward_candidates, 'forward + backward': operator.training_candidates}
    skipped: dict[str, str] = {}
    for group in groups:
        results: dict[str, dict[str, Row]] = {mode: {} for mode in modes}
        work = [(mode, case) for mode in modes for case in cases[group]]
        for mode, case in tqdm(work, desc=group, unit='case'):
            calls = usable(modes[mode](case, args.device), skipped)
            results[mode][case.name] = measure(calls, args.device, args.repeats)
        for mode, rows in results.items():
            print(f'\n{args.operator}, {mode}: time / {operator.BASELINE}\n\n{table(rows, operator.BASELINE)}')
            print(f'\n{memory_table(rows)}', flush=True)
        name = f'{args.operator}-{group}-{args.device}-{args.threads}'
        record = {
            'machine': facts,
            'results': {
                mode: {case: {n: vars(m) for n, m in row.items()} for case, row in rows.items()}
                for mode, rows in results.items()
            },
        }
        (args.out / f'{name}.json').write_text(json.dumps(record, indent=1))
        chart(results, operator.BASELINE, f'{args.operator} ({group})', args.out / f'{name}.png')
    for name, reason in skipped.items():
        print(f'skipped {name}: {reason}')


if __name__ == '__main__':
    main()
