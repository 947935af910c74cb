# SPDX-License-Identifier: Apache-2.0
"""The experiments' runner: real runs of seconds, killed and gone on with, and its statistics."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from mmdcn.datasets import mnist_scenes
from mmdcn.engine.launch import LaunchError
from mmdcn.experiments import report
from mmdcn.experiments.results import Result, Results
from mmdcn.experiments.runs import Run, execute_all, locked
from mmdcn.experiments.sets import SETS, Experiment, ExperimentSet

ROOT = Path(__file__).parents[1]

# The first row of the set alone, so that 2 seeds take seconds.
ONE_ROW = f"""
import runpy
from mmdcn.experiments.sets import SETS
del SETS['mnist_scenes'].experiments[1:]
runpy.run_path({str(ROOT / 'tools/run_experiments.py')!r}, run_name='__main__')
"""
OPTIONS = [
    'train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2',
    'model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32,64]',
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to work in, with a dataset of a few scenes."""
    arguments = ['--out-dir', tmp_path / 'data/mnist_scenes', '--num-train', 4, '--num-test', 2, '--size', 96]
    assert mnist_scenes.main(list(map(str, arguments))) == 0
    return tmp_path


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen]:
    """Run the tool in a process group, of which nothing is left at the end."""
    arguments = ['mnist_scenes', '--seeds', '2', '--out', 'out', '--cfg-options', *OPTIONS, *options]
    process = subprocess.Popen(
        [sys.executable, '-c', ONE_ROW, *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def is_locked(folder: Path) -> bool:
    with open(folder / 'out/lock') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_results(folder: Path) -> dict[str, Result]:
    """The results of the first row."""
    content = json.loads((folder / 'out/results/mnist_scenes.json').read_text())
    return content['faster-rcnn_r18-w32_fpn_6e_mnist-scenes']


def test_a_killed_set_goes_on_and_reports_every_run(folder: Path) -> None:
    runs = folder / 'out/runs/mnist_scenes/faster-rcnn_r18-w32_fpn_6e_mnist-scenes'
    output = runs / 'seed_1/output.txt'
    with started(folder) as process:
        # Its first words, since the file is there a moment before the training, which then holds the lock.
        wait_for(lambda: output.exists() and output.stat().st_size, process)
        first = read_results(folder)['seed_0']
        process.kill()  # this process alone: what it has started works on
        process.wait()
        assert is_locked(folder)
        with started(folder) as second:
            printed, progress = second.communicate()
            assert second.returncode == 0, progress

    assert 'waiting until it is free' in printed
    assert '4/4' in progress
    results = read_results(folder)
    assert results.keys() == {'seed_0', 'seed_1'} and results['seed_0'] == first
    ap50 = report.mean_and_deviation([100 * result['metrics']['coco/bbox_mAP_50'] for result in results.values()])
    assert f'| {ap50} |' in ' '.join(printed.split())
    assert sorted(path.name for path in runs.glob('*/*.pth')) == ['epoch_2.pth'] * 2
    assert (folder / 'out/mnist_scenes.md').read_text().startswith(printed[printed.index('|') :].strip())


def make_run(experiment: Experiment, out: Path, seed: int = 0, options: dict | None = None) -> Run:
    return Run(experiment, seed, out, Results(out / 'results'), options or {})


def write_results(out: Path, chosen: ExperimentSet, missing: Collection[tuple[int, int]] = ()) -> list[Run]:
    """Stand for runs of 60, 62 and 64 per cent for the baseline, and 10 more in each row after it.

    `missing` are those, by row and seed, that are not finished.
    """
    results = Results(out / 'results')
    runs = []
    for row, experiment in enumerate(chosen.experiments):
        for seed in range(3):
            run = Run(experiment, seed, out, results, {})
            ap = (60 + 10 * row + 2 * seed) / 100
            if (row, seed) not in missing:
                metrics = {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': ap / 2}
                results.keep(*run.key, Result(settings=run.settings, metrics=metrics))
            runs.append(run)
    return runs


def test_the_table_and_the_plot_have_every_experiment(tmp_path: Path) -> None:
    chosen = SETS['stages']
    text = report.report('stages', chosen, write_results(tmp_path, chosen), tmp_path)
    rows = [[cell.strip() for cell in row.strip('|').split('|')] for row in text.splitlines()]
    assert rows[2] == ['Faster R-CNN', 'none', '62.0 ± 2.0', '31.0 ± 1.0', '3', '3.90', '', '']
    assert rows[4] == [
        'Faster R-CNN', 'c4-c5', '82.0 ± 2.0', '41.0 ± 1.0', '3', '4.08', '+20.0 (+15.5 to +24.5)', 'higher',
    ]  # fmt: skip
    assert len(rows) == 2 + 4
    assert text in (tmp_path / 'stages.md').read_text()
    assert (tmp_path / 'stages.png').read_bytes().startswith(b'\x89PNG')


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    experiment = SETS['stages'].experiments[0]
    for _ in range(2):
        make_run(experiment, tmp_path).claim()
    with pytest.raises(LaunchError, match='seed_0 has a run with other settings: pass another --out'):
        make_run(experiment, tmp_path, options={'train_cfg.max_epochs': 7}).claim()


def test_a_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    chosen = SETS['stages']
    (run, *_) = write_results(tmp_path, chosen)
    other = make_run(run.experiment, tmp_path, options={'train_cfg.max_epochs': 7})
    with pytest.raises(LaunchError, match=r'mnist_scenes\.json: faster-rcnn.*, seed_0, has a run with other settings'):
        report.finished([other])
    with pytest.raises(LaunchError, match='seed_0, has a run with other settings'):
        other.claim()


def test_results_are_read_back_and_differ_in_the_lines_of_what_is_new(tmp_path: Path) -> None:
    first, second = (Result(settings='0' * 64, metrics={'coco/bbox_mAP': ap}) for ap in (0.5, 0.6))
    Results(tmp_path).keep('data', 'config', 0, first)
    before = (tmp_path / 'data.json').read_text().splitlines()
    Results(tmp_path).keep('data', 'config', 1, second)
    after = (tmp_path / 'data.json').read_text().splitlines()
    assert [Results(tmp_path).find('data', 'config', seed) for seed in range(3)] == [first, second, None]
    assert set(before) <= set(after) and len(after) == len(before) + 6
    assert list(tmp_path.iterdir()) == [tmp_path / 'data.json']


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=['', 'in the background of a script'])
def _disposition(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a process inherits from its shell for SIGINT."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('_disposition')
def test_a_stopped_command_leaves_no_process(folder: Path) -> None:
    with started(folder) as process:
        wait_for(lambda: list(folder.glob('out/runs/*/*/*/output.txt')), process)
        process.terminate()
        _, errors = process.communicate()
        assert process.returncode == 1
        assert errors.splitlines()[-1] == 'error: stopped; run the same command to continue'
        deadline = time.monotonic() + 60
        while is_locked(folder):
            assert time.monotonic() < deadline, 'a process still holds the lock'
            time.sleep(0.05)


def test_a_failing_run_is_named_with_the_place_of_its_last_words(tmp_path: Path) -> None:
    options = {'train_dataloader.dataset.data_root': 'none/'}
    run = make_run(SETS['mnist_scenes'].experiments[0], tmp_path, options=options)
    run.claim()
    message = rf'tools/train.py ended with status 1: its output is in {run.folder}/output.txt'
    with locked(tmp_path) as lock, pytest.raises(LaunchError, match=message):
        asyncio.run(execute_all([run], 1, lock))
    assert 'none/annotations/train.json does not exist' in (run.folder / 'output.txt').read_text().splitlines()[-1]
    assert not run.result


def test_an_empty_last_checkpoint_counts_for_none(tmp_path: Path) -> None:
    run = make_run(SETS['stages'].experiments[0], tmp_path)
    assert run.epochs_done() == 0
    run.folder.mkdir(parents=True)
    for text, epochs in (('', 0), (f'{run.folder}/epoch_5.pth', 5)):
        (run.folder / 'last_checkpoint').write_text(text)
        assert run.epochs_done() == epochs
    run.results.keep(*run.key, Result(settings=run.settings, metrics={}))
    assert run.epochs_done() == 6


@pytest.mark.parametrize(
    ('values', 'baseline', 'expected'),
    [
        ([60.0, 62.0, 64.0], [57.0, 59.0, 61.0], 'none shown'),
        ([60.0, 62.0, 64.0], [50.0, 52.0, 54.0], 'higher'),
        ([50.0, 52.0, 54.0], [60.0, 62.0, 64.0], 'lower'),
    ],
)
def test_for_equal_deviations_the_interval_is_that_of_student(
    values: list[float], baseline: list[float], expected: str
) -> None:
    shift = np.mean(values) - np.mean(baseline)
    # 2.776 is the 97.5th percentile of Student's t with 3 + 3 - 2 degrees of freedom.
    half = 2.776 * np.sqrt(np.var(values, ddof=1) / 3 + np.var(baseline, ddof=1) / 3)
    text, verdict = report.difference(values, baseline)
    assert text == f'{shift:+.1f} ({shift - half:+.1f} to {shift + half:+.1f})'
    assert verdict == expected


def test_the_deviation_is_that_of_a_sample() -> None:
    assert report.mean_and_deviation([60.0, 62.0, 64.0]) == '62.0 ± 2.0'


@pytest.mark.parametrize('chosen', SETS.values(), ids=SETS)
def test_the_runs_of_a_set_differ_in_folder_and_not_in_budget(chosen, tmp_path: Path) -> None:
    runs = [make_run(experiment, tmp_path) for experiment in chosen.experiments]
    assert len({run.folder for run in runs}) == len(runs)
    budgets = [[run.cfg.to_dict()[key] for key in ('train_cfg', 'optim_wrapper')] for run in runs]
    for _, optim_wrapper in budgets:
        for factor in ('dcn_offset_lr_mult', 'custom_keys'):
            optim_wrapper['paramwise_cfg'].pop(factor, None)
    assert all(budget == budgets[0] for budget in budgets)
    assert {run.experiment.baseline for run in runs} - {None} <= {run.experiment for run in runs}


def test_sets_share_the_runs_that_they_have_in_common(tmp_path: Path) -> None:
    runs: dict[tuple, list[Run]] = {}
    for chosen in SETS.values():
        for experiment in chosen.experiments:
            run = make_run(experiment, tmp_path)
            runs.setdefault(run.key, []).append(run)
    assert len(runs) == 28
    shared = [same for same in runs.values() if len(same) > 1]
    assert sorted(len(same) for same in shared) == [2, 2, 2, 2, 2, 2, 4, 5]
    assert all(run.cfg.to_dict() == same[0].cfg.to_dict() for same in shared for run in same)


def test_a_report_has_what_is_finished_and_compares_it_with_what_is(tmp_path: Path) -> None:
    chosen = SETS['stages']
    last, baseline = (len(chosen.experiments) - 1, 2), (0, 0)
    runs = write_results(tmp_path / 'one', chosen, missing=[last])
    rows = report.report('stages', chosen, runs, tmp_path).splitlines()[2:]
    assert ['| c5 ' in row for row in rows] == [False, True, False]
    runs = write_results(tmp_path / 'two', chosen, missing=[last, baseline])
    rows = report.report('stages', chosen, runs, tmp_path).splitlines()[2:]
    assert [row.split('|')[-3].strip() for row in rows] == ['', '']
    runs = write_results(tmp_path / 'none', chosen, missing=[(row, 0) for row in range(len(chosen.experiments))])
    with pytest.raises(LaunchError, match='no experiment of stages is finished with all its seeds'):
        report.report('stages', chosen, runs, tmp_path)


def kept_runs(chosen: ExperimentSet) -> list[Run]:
    """Return a set's runs where the repository keeps the results."""
    return [make_run(experiment, ROOT / 'experiments', seed) for seed in range(3) for experiment in chosen.experiments]


REPORTED = [name for name in SETS if (ROOT / f'experiments/{name}.md').exists()]


@pytest.mark.parametrize('name', REPORTED)
def test_the_pages_have_the_tables_of_the_kept_results(name: str, tmp_path: Path) -> None:
    chosen = SETS[name]
    runs = kept_runs(chosen)
    text = report.report(name, chosen, runs, tmp_path)
    assert (ROOT / f'experiments/{name}.md').read_text() == (tmp_path / f'{name}.md').read_text()
    assert text in (ROOT / 'configs' / Path(chosen.experiments[0].config).with_name('README.md')).read_text()
