# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the finished runs."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from scipy import stats
from tabulate import tabulate

from mmdcn.engine.launch import LaunchError
from mmdcn.experiments.runs import Run
from mmdcn.experiments.sets import Experiment, ExperimentSet
from mmdcn.utils.files import replacing

METRICS = {'AP': 'coco/bbox_mAP', 'AP50': 'coco/bbox_mAP_50'}
NOTE = """
Box AP and AP50 in per cent after the last epoch: mean ± sample standard deviation over the seeds. The difference is
that of the mean APs, with its 95 % confidence interval (Welch's t, not corrected for the number of rows): "none shown"
means that the interval contains 0.
"""


def count_parameters(cfg: Config) -> int:
    """Count the parameters of a config's model."""
    register_all_modules()
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in MODELS.build(deepcopy(cfg.model)).parameters())


def mean_and_deviation(values: list[float]) -> str:
    """Format the mean and the sample standard deviation."""
    return f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}'


def difference(values: list[float], baseline: list[float]) -> tuple[str, str]:
    """Format the difference of the means with its 95 % confidence interval, and which mean is higher."""
    low, high = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval(0.95)
    verdict = 'higher' if low > 0 else 'lower' if high < 0 else 'none shown'
    return f'{np.mean(values) - np.mean(baseline):+.1f} ({low:+.1f} to {high:+.1f})', verdict


Figures = dict[Experiment, dict[str, list[float]]]  # per cent, by metric, one value per seed


def table(chosen: ExperimentSet, figures: Figures, parameters: dict[Experiment, int]) -> str:
    """Format the table in Markdown."""
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
    """Plot the AP of every series."""
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    ax = figure.subplots()
    all_series = list(dict.fromkeys(experiment.series for experiment in figures))
    for index, series in enumerate(all_series):
        points = {e.x: values['AP'] for e, values in figures.items() if e.series == series}
        means, deviations = ([f(values) for values in points.values()] for f in (np.mean, partial(np.std, ddof=1)))
        if all(isinstance(x, float) for x in points):
            line, place = '-', ax.transData
        else:  # the series side by side above each category
            line, place = 'none', Affine2D().translate(0.1 * (index - (len(all_series) - 1) / 2), 0) + ax.transData
        ax.errorbar(
            list(points), means, deviations, marker='o', linestyle=line, capsize=4, label=series, transform=place
        )
    seeds = len(next(iter(figures.values()))['AP'])
    ax.set(xlabel=chosen.x_label, ylabel=f'box AP (%), mean ± standard deviation, {seeds} seeds')
    ax.legend(title=chosen.series_label)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def finished(runs: list[Run]) -> Figures:
    """Collect the figures of the experiments whose runs are all finished.

    Raises:
        LaunchError: If a run has other settings.
    """
    figures: Figures = {}
    for experiment in dict.fromkeys(run.experiment for run in runs):
        own = [run for run in runs if run.experiment == experiment]
        metrics = [run.result['metrics'] for run in own if run.result]
        if len(metrics) == len(own):
            for run in own:
                run.check()
            figures[experiment] = {name: [100 * values[key] for values in metrics] for name, key in METRICS.items()}
    return figures


def report(name: str, chosen: ExperimentSet, runs: list[Run], out: Path) -> str:
    """Write the table and the plot of the finished experiments, and return the table.

    Raises:
        LaunchError: If no experiment is finished.
    """
    figures = finished(runs)
    if not figures:
        raise LaunchError(f'no experiment of {name} is finished with all its seeds')
    text = table(chosen, figures, {run.experiment: count_parameters(run.cfg) for run in runs if run.seed == 0})
    with replacing(out / f'{name}.md') as file:
        file.write_text(f'{text}\n{NOTE}')
    with replacing(out / f'{name}.png') as file:
        plot(chosen, figures, file)
    return text
