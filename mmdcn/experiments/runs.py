# SPDX-License-Identifier: Apache-2.0
"""Runs of experiments: their settings, work folders and execution."""

import asyncio
import fcntl
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from mmengine.config import Config
from tqdm import tqdm

from mmdcn.checkpoints.zoo import MIM
from mmdcn.engine.launch import LaunchError
from mmdcn.experiments.results import Result, Results
from mmdcn.experiments.sets import Experiment
from mmdcn.utils.files import replacing


@dataclass(frozen=True)
class Run:
    """An experiment with one seed, the results to which it adds its own, and the folder for all output."""

    experiment: Experiment
    seed: int
    out: Path
    results: Results
    extra_options: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int]:
        """The key of the run in the results: dataset, config, seed."""
        return self.experiment.data.name, Path(self.experiment.config).stem, self.seed

    @property
    def folder(self) -> Path:
        """The work folder."""
        data, config, seed = self.key
        return self.out / 'runs' / data / config / f'seed_{seed}'

    @property
    def result(self) -> Result | None:
        """The result, or None if the run is not finished."""
        return self.results.find(*self.key)

    @property
    def options(self) -> dict[str, Any]:
        """The settings that override those of the config."""
        # The test after the training replaces validation.
        own = {'randomness.seed': self.seed, 'train_cfg.val_begin': sys.maxsize}
        return self.extra_options | self.experiment.options | own

    @cached_property
    def cfg(self) -> Config:
        """The config, with the options applied."""
        cfg = Config.fromfile(MIM / 'configs' / self.experiment.config)
        cfg.merge_from_dict(self.options)
        return cfg

    @cached_property
    def settings(self) -> str:
        """The sha256 of the config with the options applied."""
        return hashlib.sha256(json.dumps(self.cfg.to_dict()).encode()).hexdigest()

    @property
    def epochs(self) -> int:
        """The number of epochs to train."""
        return self.cfg.train_cfg.max_epochs

    def epochs_done(self) -> int:
        """Return the number of finished epochs."""
        if self.result:
            return self.epochs
        last = self.folder / 'last_checkpoint'
        return int(Path(last.read_text()).stem.removeprefix('epoch_') or 0) if last.exists() else 0

    def check(self) -> None:
        """Check that neither the results nor the work folder has a run with other settings.

        Raises:
            LaunchError: If one of them has such a run.
        """
        if self.result:
            data, config, seed = self.key
            _compare(f'{self.results.path(data)}: {config}, seed_{seed},', self.result['settings'], self.settings)
        elif self._noted.exists():
            _compare(f'{self.folder}', self._noted.read_text(), self.settings)

    def claim(self) -> None:
        """Write the settings to the work folder, so that no run with other settings resumes from its checkpoints.

        Raises:
            LaunchError: If the results or the work folder have a run with other settings.
        """
        self.check()
        if not self.result and not self._noted.exists():
            with replacing(self._noted) as file:
                file.write_text(self.settings)

    @property
    def _noted(self) -> Path:
        return self.folder / 'settings.sha256'

    async def execute(self, threads: int, lock: int) -> None:
        """Train, test and store the metrics, in processes that hold the lock and are killed on cancellation.

        Raises:
            LaunchError: If a process fails.
        """
        final = self.folder / f'epoch_{self.epochs}.pth'
        await self._call('train.py', self.folder, ['--resume'], threads, lock)
        await self._call('test.py', self.folder / 'test', [final], threads, lock)
        metrics = max(self.folder.glob('test/*/*.json'))  # MMEngine writes them to folders named by the time
        self.results.keep(*self.key, Result(settings=self.settings, metrics=json.loads(metrics.read_text())))
        for checkpoint in self.folder.glob('epoch_*.pth'):
            if checkpoint != final:
                checkpoint.unlink()

    async def _call(self, tool: str, work_dir: Path, arguments: list[Any], threads: int, lock: int) -> None:
        options = [f'{key}={value}' for key, value in self.options.items()]
        config = MIM / 'configs' / self.experiment.config
        command = [MIM / 'tools' / tool, config, *arguments, '--work-dir', work_dir, '--cfg-options', *options]
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
            raise LaunchError(f'tools/{tool} ended with status {status}: its output is in {output.name}')


def _compare(place: str, found: str, settings: str) -> None:
    if found != settings:
        raise LaunchError(f'{place} has a run with other settings: pass another --out, or delete it')


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock. Child processes inherit it, and keep it if this process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{folder} is in use, perhaps by processes of a killed command: waiting until it is free', flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def prepare(experiment: Experiment) -> None:
    """Make the dataset if it does not exist.

    Raises:
        LaunchError: If the converter fails.
    """
    if not experiment.data.exists():
        strength = [] if experiment.deformation is None else ['--deformation', str(experiment.deformation)]
        maker = import_module(f'mmdcn.datasets.{Path(experiment.config).parent.name}')
        if maker.main(['--out-dir', str(experiment.data), *strength]) != 0:
            raise LaunchError(f'{experiment.data} could not be made')


async def execute_all(runs: list[Run], jobs: int, lock: int) -> None:
    """Execute the unfinished runs, `jobs` at a time; if some fail, the others are still executed."""
    # SIGTERM cancels the task. An exception that is raised while a process starts would leave that process running.
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGTERM, cast(asyncio.Task[Any], asyncio.current_task()).cancel
    )
    slots, threads = asyncio.Semaphore(jobs), max(1, len(os.sched_getaffinity(0)) // jobs)

    async def execute(run: Run) -> None:
        async with slots:
            await run.execute(threads, lock)

    tasks = [asyncio.create_task(execute(run)) for run in runs if not run.result]
    done = sum(run.epochs_done() for run in runs)
    with tqdm(total=sum(run.epochs for run in runs), initial=done, unit='epoch', desc=f'{len(runs)} runs') as bar:
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=1)
            bar.update(sum(run.epochs_done() for run in runs) - bar.n)
    failures = [str(task.exception()) for task in tasks if task.exception()]
    if failures:
        raise LaunchError('\n'.join(failures))


def train(runs: list[Run], jobs: int, lock: int) -> None:
    """Make the datasets of the unfinished runs, and execute these runs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM also ends the child processes
    for run in runs:
        run.claim()
        if not run.result:
            prepare(run.experiment)
    asyncio.run(execute_all(runs, jobs, lock))
