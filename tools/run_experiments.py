# SPDX-License-Identifier: Apache-2.0
"""Train and test sets of experiments with several seeds each, and write their tables and plots.

Stopped at any point, even by SIGKILL, the same command goes on: finished runs stay as they are, and a broken-off one
continues from its last checkpoint. Sets share the runs that they have in common.

    OUT/SET.md, SET.png                the table, the plot
    OUT/runs/DATA/CONFIG/seed_K/       one run: settings.sha256 of its config; when it is finished, result.json

A result is not measured again, so where a repository keeps result.json and settings.sha256, the command prints the
tables at once, and trains what is missing. Each run has cores divided by --jobs threads; with another number of them
its last bits may differ.
"""

import argparse
import asyncio
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.transforms import Affine2D
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from mmdcn.engine.launch import LaunchError
from mmdcn.engine.launch import run as run_tool

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / 'configs'
METRICS = {'AP': 'coco/bbox_mAP', 'AP50': 'coco/bbox_mAP_50'}
NOTE = """
Box AP and AP50 in per cent after the last epoch: mean ± sample standard deviation over the seeds. The difference is
that of the mean APs, with its 95 % confidence interval (Welch's t, not corrected for the number of rows): "none shown"
means that the interval contains 0.
"""


@dataclass(frozen=True)
class Experiment:
    """One row of the table and one point of the plot."""

    series: str
    x: str | float
    config: str  # in configs/
    baseline: 'Experiment | None' = None
    deformation: float | None = None  # of the MNIST scenes; None: the data set as the config has it

    @property
    def data(self) -> Path:
        name = Path(self.config).parent.name
        return Path('data', name if self.deformation is None else f'{name}_{self.deformation}')

    @property
    def options(self) -> dict[str, Any]:
        if self.deformation is None:
            return {}
        roots = {f'{loop}_dataloader.dataset.data_root': f'{self.data}/' for loop in ('train', 'val', 'test')}
        truth = {f'{loop}_evaluator.ann_file': f'{self.data}/annotations/test.json' for loop in ('val', 'test')}
        return roots | truth


@dataclass(frozen=True)
class ExperimentSet:
    """The experiments of one table, and what its first two columns are."""

    experiments: list[Experiment]
    series_label: str
    x_label: str


def compare_layers(folder: str) -> ExperimentSet:
    ending = f'fpn_6e_{folder.replace("_", "-")}.py'
    layers = {'DCN': '-dconv-c3-c5', 'DCNv2': '-mdconv-c3-c5'}
    detectors = {
        'Faster R-CNN': ('faster-rcnn', layers | {'DCNv2, 4 groups': '-mdconv-group4-c3-c5'}),
        'RetinaNet': ('retinanet', layers),
    }
    experiments = []
    for detector, (stem, tags) in detectors.items():
        plain = Experiment(detector, 'plain', f'{folder}/{stem}_r18-w32_{ending}')
        experiments.append(plain)
        for layer, tag in tags.items():
            experiments.append(Experiment(detector, layer, f'{folder}/{stem}_r18-w32{tag}_{ending}', plain))
    return ExperimentSet(experiments, 'detector', '3x3 convolutions of c3-c5')


def compare_stages() -> ExperimentSet:
    config = 'mnist_scenes/faster-rcnn_r18-w32{}_fpn_6e_mnist-scenes.py'
    plain = Experiment('Faster R-CNN', 'none', config.format(''))
    stages = [
        Experiment('Faster R-CNN', stages, config.format(f'-mdconv-{stages}'), plain)
        for stages in ('c5', 'c4-c5', 'c3-c5')
    ]
    return ExperimentSet([plain, *stages], 'detector', 'stages with DCNv2')


def compare_roi_pooling() -> ExperimentSet:
    config = 'mnist_scenes/faster-rcnn_r18-w32_fpn_{}6e_mnist-scenes.py'
    plain = Experiment('Faster R-CNN', 'RoIAlign', config.format(''))
    pools = {'deformable': 'dpool_', 'deformable, modulated': 'mdpool_'}
    experiments = [Experiment('Faster R-CNN', name, config.format(tag), plain) for name, tag in pools.items()]
    return ExperimentSet([plain, *experiments], 'detector', 'RoI pooling')


def compare_offset_rates(folder: str, schedules: dict[str, str]) -> ExperimentSet:
    experiments = []
    for detector, stem in {'Faster R-CNN': 'faster-rcnn', 'RetinaNet': 'retinanet'}.items():
        config = f'{folder}/{stem}_r18-w32{{}}_{folder.replace("_", "-")}.py'
        plain = Experiment(detector, 'plain', config.format('_fpn_6e'))
        experiments.append(plain)
        for rate, schedule in schedules.items():
            experiments.append(Experiment(detector, rate, config.format(f'-mdconv-c3-c5_fpn_{schedule}'), plain))
    return ExperimentSet(experiments, 'detector', "learning rate of DCNv2's offsets, relative")


def compare_deformations() -> ExperimentSet:
    """Train and test at the same strength; at 1, the data set's own, the runs are those of `mnist_scenes`."""
    config = 'mnist_scenes/faster-rcnn_r18-w32{}_fpn_6e_mnist-scenes.py'
    strengths = {0.0: 0.0, 0.5: 0.5, 1.0: None, 1.5: 1.5}
    plain = [Experiment('plain', x, config.format(''), None, strength) for x, strength in strengths.items()]
    dcnv2 = [Experiment('DCNv2', e.x, config.format('-mdconv-c3-c5'), e, e.deformation) for e in plain]
    return ExperimentSet(plain + dcnv2, '3x3 convolutions of c3-c5', 'strength of deformation (1: ±45°, 20 to 65 px)')


SETS = {
    'mnist_scenes': compare_layers('mnist_scenes'),
    'neon_trees': compare_layers('neon_trees'),
    'mnist_scenes_offset_rates': compare_offset_rates('mnist_scenes', {'0.1': '6e-tenth-offset-lr', '1': '6e'}),
    'neon_trees_offset_rates': compare_offset_rates('neon_trees', {'0.1': '6e', '1': '6e-full-offset-lr'}),
    'stages': compare_stages(),
    'roi_pooling': compare_roi_pooling(),
    'deformation': compare_deformations(),
}


@dataclass(frozen=True)
class Run:
    """An experiment with one seed, and the folder that holds it."""

    experiment: Experiment
    seed: int
    out: Path
    extra_options: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.out / 'runs' / self.experiment.data.name / Path(self.experiment.config).stem / f'seed_{self.seed}'

    @property
    def result(self) -> Path:
        return self.folder / 'result.json'

    @property
    def options(self) -> dict[str, Any]:
        # The test after the training takes the place of validations.
        own = {'randomness.seed': self.seed, 'train_cfg.val_begin': sys.maxsize}
        return self.extra_options | self.experiment.options | own

    @cached_property
    def cfg(self) -> Config:
        cfg = Config.fromfile(CONFIGS / self.experiment.config)
        cfg.merge_from_dict(self.options)
        return cfg

    @property
    def epochs(self) -> int:
        return self.cfg.train_cfg.max_epochs

    def epochs_done(self) -> int:
        if self.result.exists():
            return self.epochs
        last = self.folder / 'last_checkpoint'
        return int(Path(last.read_text()).stem.removeprefix('epoch_') or 0) if last.exists() else 0

    def claim(self) -> None:
        """Note the settings of the run, so that figures of other settings are never taken for its own.

        Raises:
            LaunchError: If the folder has a run with other settings.
        """
        settings = hashlib.sha256(json.dumps(self.cfg.to_dict()).encode()).hexdigest()
        noted = self.folder / 'settings.sha256'
        if not noted.exists():
            write(noted, settings)
        elif noted.read_text() != settings:
            raise LaunchError(f'{self.folder} has a run with other settings: pass another --out, or delete the folder')

    async def execute(self, threads: int, lock: int) -> None:
        """Train, test and keep the metrics, in processes that hold the lock, and die if this is cancelled.

        Raises:
            LaunchError: If a process fails.
        """
        final = self.folder / f'epoch_{self.epochs}.pth'
        await self._call('train.py', self.folder, ['--resume'], threads, lock)
        await self._call('test.py', self.folder / 'test', [final], threads, lock)
        metrics = max(self.folder.glob('test/*/*.json'))  # mmengine's, in folders named by their time
        write(self.result, metrics.read_text())
        for checkpoint in self.folder.glob('epoch_*.pth'):
            if checkpoint != final:
                checkpoint.unlink()

    async def _call(self, tool: str, work_dir: Path, arguments: list, threads: int, lock: int) -> None:
        options = [f'{key}={value}' for key, value in self.options.items()]
        config = CONFIGS / self.experiment.config
        command = [TOOLS / tool, config, *arguments, '--work-dir', work_dir, '--cfg-options', *options]
        with open(self.folder / 'output.txt', 'a') as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *map(str, command), stdout=output, stderr=output, pass_fds=[lock],
                env=os.environ | {'OMP_NUM_THREADS': str(threads)},
            )  # fmt: skip
            try:
                status = await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if status != 0:
            raise LaunchError(f'tools/{tool} ended with status {status}: its last words are in {output.name}')


def write(path: Path, text: str) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + '.partial')
    beside.write_text(text)
    beside.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock. The processes that inherit it keep it when this one is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{folder} is in use, perhaps by what a killed command has left: waiting until it ends', flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def prepare(experiment: Experiment) -> None:
    """Make the data set if it is not there."""
    if not experiment.data.exists():
        converter = TOOLS / 'dataset_converters' / f'{Path(experiment.config).parent.name}.py'
        strength = [] if experiment.deformation is None else ['--deformation', str(experiment.deformation)]
        command = [sys.executable, str(converter), '--out-dir', str(experiment.data), *strength]
        if subprocess.run(command, check=False).returncode != 0:
            raise LaunchError(f'{experiment.data} could not be made')


async def execute_all(runs: list[Run], jobs: int, lock: int) -> None:
    """Execute the unfinished runs, so many at a time; if some fail, the others are still executed."""
    # An exception could come in the middle of starting a process, which would then go on by itself.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cast(asyncio.Task, asyncio.current_task()).cancel)
    slots, threads = asyncio.Semaphore(jobs), max(1, len(os.sched_getaffinity(0)) // jobs)

    async def execute(run: Run) -> None:
        async with slots:
            await run.execute(threads, lock)

    tasks = [asyncio.create_task(execute(run)) for run in runs if not run.result.exists()]
    done = sum(run.epochs_done() for run in runs)
    with tqdm(total=sum(run.epochs for run in runs), initial=done, unit='epoch', desc=f'{len(runs)} runs') as bar:
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=1)
            bar.update(sum(run.epochs_done() for run in runs) - bar.n)
    failures = [str(task.exception()) for task in tasks if task.exception()]
    if failures:
        raise LaunchError('\n'.join(failures))


def train(runs: list[Run], jobs: int, lock: int) -> None:
    """Make what the runs need, and execute those that are not finished."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it takes down what is started
    for run in runs:
        run.claim()
        if not run.result.exists():
            prepare(run.experiment)
    asyncio.run(execute_all(runs, jobs, lock))


def count_parameters(cfg: Config) -> int:
    register_all_modules()
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in MODELS.build(deepcopy(cfg.model)).parameters())


def mean_and_deviation(values: list[float]) -> str:
    return f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}'


def difference(values: list[float], baseline: list[float]) -> tuple[str, str]:
    """Give the difference of the means with its interval, and which is higher, if that is known."""
    low, high = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval(0.95)
    verdict = 'higher' if low > 0 else 'lower' if high < 0 else 'none shown'
    return f'{np.mean(values) - np.mean(baseline):+.1f} ({low:+.1f} to {high:+.1f})', verdict


Figures = dict[Experiment, dict[str, list[float]]]  # per cent, by metric, one for each seed


def table(chosen: ExperimentSet, figures: Figures, parameters: dict[Experiment, int]) -> str:
    rows = []
    for experiment, values in figures.items():
        compared = ('', '')
        if experiment.baseline in figures:
            compared = difference(values['AP'], figures[experiment.baseline]['AP'])
        cells = [mean_and_deviation(values[metric]) for metric in METRICS]
        size = f'{parameters[experiment] / 1e6:.2f}'
        rows.append([experiment.series, experiment.x, *cells, len(values['AP']), size, *compared])
    headers = [chosen.series_label, chosen.x_label, *METRICS, 'seeds', 'parameters (M)', 'AP - plain', 'difference']
    return tabulate(rows, headers, tablefmt='github', disable_numparse=True)


def plot(chosen: ExperimentSet, figures: Figures, path: Path) -> None:
    figure, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    all_series = list(dict.fromkeys(experiment.series for experiment in figures))
    for index, series in enumerate(all_series):
        points = {e.x: values['AP'] for e, values in figures.items() if e.series == series}
        means, deviations = ([f(values) for values in points.values()] for f in (np.mean, partial(np.std, ddof=1)))
        if all(isinstance(x, float) for x in points):
            line, place = '-', ax.transData
        else:  # side by side above the name of the category
            line, place = 'none', Affine2D().translate(0.1 * (index - (len(all_series) - 1) / 2), 0) + ax.transData
        ax.errorbar(
            list(points), means, deviations, marker='o', linestyle=line, capsize=4, label=series, transform=place
        )
    seeds = len(next(iter(figures.values()))['AP'])
    ax.set(xlabel=chosen.x_label, ylabel=f'box AP (%), mean ± standard deviation, {seeds} seeds')
    ax.legend(title=chosen.series_label)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def finished(runs: list[Run]) -> Figures:
    """Read the figures of the experiments of which every run is finished.

    Raises:
        LaunchError: If one has other settings.
    """
    figures: Figures = {}
    for experiment in dict.fromkeys(run.experiment for run in runs):
        own = [run for run in runs if run.experiment == experiment]
        if all(run.result.exists() for run in own):
            for run in own:
                run.claim()
            metrics = [json.loads(run.result.read_text()) for run in own]
            figures[experiment] = {name: [100 * values[key] for values in metrics] for name, key in METRICS.items()}
    return figures


def report(name: str, chosen: ExperimentSet, runs: list[Run], out: Path) -> str:
    """Write the table and the plot of what is finished; give the table.

    Raises:
        LaunchError: If nothing is.
    """
    figures = finished(runs)
    if not figures:
        raise LaunchError(f'no experiment of {name} is finished with all its seeds')
    text = table(chosen, figures, {run.experiment: count_parameters(run.cfg) for run in runs if run.seed == 0})
    write(out / f'{name}.md', f'{text}\n{NOTE}')
    plot(chosen, figures, out / f'{name}.png')
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('sets', nargs='+', choices=[*SETS, 'all'], help='what to compare')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each experiment, with the seeds 0, 1, ...')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument('--report', action='store_true', help='print what is finished, and train nothing')
    parser.add_argument('--out', type=Path, default=Path('experiments'), help='folder for all that is made')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help="settings for every run that replace the configs'",
    )
    args = parser.parse_args()
    if args.seeds < 2 or args.jobs < 1:
        parser.error('--seeds must be at least 2, for a standard deviation, and --jobs at least 1')
    return args


def main() -> None:
    args = parse_args()
    try:
        with nullcontext() if args.report else locked(args.out) as lock:
            for name in SETS if 'all' in args.sets else args.sets:
                chosen = SETS[name]
                seeds = range(args.seeds)
                runs = [Run(e, seed, args.out, args.cfg_options) for seed in seeds for e in chosen.experiments]
                if lock is not None:
                    train(runs, args.jobs, lock)
                print(f'\n{name}\n\n{report(name, chosen, runs, args.out)}', flush=True)
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise LaunchError('stopped; the same command goes on') from None


if __name__ == '__main__':
    sys.exit(run_tool(main))
