# SPDX-License-Identifier: Apache-2.0
"""Train and test sets of experiments with several seeds each, and write their tables and plots.

The command can be stopped at any point, even by SIGKILL, and run again to continue: finished runs are kept, and an
interrupted run resumes from its last checkpoint. Sets share their common runs.

    OUT/SET.md, SET.png                the table and the plot
    OUT/results/DATA.json              the finished runs on a dataset: sha256 of their settings, metrics
    OUT/runs/DATA/CONFIG/seed_K/       the work folder of a run

Runs with a result in OUT/results are not repeated: the command trains only the missing runs, and prints the tables.
Each run has as many threads as the number of cores divided by --jobs; the last bits of its results may depend on that.
"""

import argparse
import asyncio
import sys
from contextlib import nullcontext
from pathlib import Path

from mmengine.config import DictAction

from mmdcn.engine.launch import LaunchError
from mmdcn.engine.launch import run as run_tool
from mmdcn.experiments.report import report
from mmdcn.experiments.results import Results
from mmdcn.experiments.runs import Run, locked, train
from mmdcn.experiments.sets import SETS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('sets', nargs='+', choices=[*SETS, 'all'], help='the sets to run')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each experiment, with seeds 0, 1, ...')
    parser.add_argument('--jobs', type=int, default=1, help='concurrent runs, which share the cores')
    parser.add_argument('--report', action='store_true', help='report the finished experiments, and train nothing')
    parser.add_argument('--out', type=Path, default=Path('experiments'), help='the folder for all output')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help="settings that override the config's in every run",
    )
    args = parser.parse_args()
    if args.seeds < 2 or args.jobs < 1:
        parser.error('--seeds must be at least 2, for a standard deviation, and --jobs at least 1')
    return args


def main() -> None:
    args = parse_args()
    try:
        with nullcontext() if args.report else locked(args.out) as lock:
            results = Results(args.out / 'results')
            for name in SETS if 'all' in args.sets else args.sets:
                chosen = SETS[name]
                seeds = range(args.seeds)
                runs = [
                    Run(experiment, seed, args.out, results, args.cfg_options)
                    for seed in seeds
                    for experiment in chosen.experiments
                ]
                if lock is not None:
                    train(runs, args.jobs, lock)
                print(f'\n{name}\n\n{report(name, chosen, runs, args.out)}', flush=True)
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise LaunchError('stopped; run the same command to continue') from None


if __name__ == '__main__':
    sys.exit(run_tool(main))
