# SPDX-License-Identifier: Apache-2.0
"""The sets of experiments, each with its baselines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Experiment:
    """A config to train and test: one row of the table and one point of the plot."""

    series: str
    x: str | float
    config: str  # in configs/
    baseline: 'Experiment | None' = None
    deformation: float | None = None  # of the MNIST scenes; None for the config's dataset

    @property
    def data(self) -> Path:
        """The folder of the dataset."""
        name = Path(self.config).parent.name
        return Path('data', name if self.deformation is None else f'{name}_{self.deformation}')

    @property
    def options(self) -> dict[str, Any]:
        """The settings that select the dataset."""
        if self.deformation is None:
            return {}
        roots = {f'{loop}_dataloader.dataset.data_root': f'{self.data}/' for loop in ('train', 'val', 'test')}
        truth = {f'{loop}_evaluator.ann_file': f'{self.data}/annotations/test.json' for loop in ('val', 'test')}
        return roots | truth


@dataclass(frozen=True)
class ExperimentSet:
    """The experiments of one table, and the headers of its first two columns."""

    experiments: list[Experiment]
    series_label: str
    x_label: str


def compare_layers(folder: str) -> ExperimentSet:
    """Compare plain convolutions, DCN and DCNv2 in both detectors."""
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
    """Compare DCNv2 in an increasing number of stages."""
    config = 'mnist_scenes/faster-rcnn_r18-w32{}_fpn_6e_mnist-scenes.py'
    plain = Experiment('Faster R-CNN', 'none', config.format(''))
    stages = [
        Experiment('Faster R-CNN', stages, config.format(f'-mdconv-{stages}'), plain)
        for stages in ('c5', 'c4-c5', 'c3-c5')
    ]
    return ExperimentSet([plain, *stages], 'detector', 'stages with DCNv2')


def compare_roi_pooling() -> ExperimentSet:
    """Compare RoIAlign and deformable RoI pooling."""
    config = 'mnist_scenes/faster-rcnn_r18-w32_fpn_{}6e_mnist-scenes.py'
    plain = Experiment('Faster R-CNN', 'RoIAlign', config.format(''))
    pools = {'deformable': 'dpool_', 'deformable, modulated': 'mdpool_'}
    experiments = [Experiment('Faster R-CNN', name, config.format(tag), plain) for name, tag in pools.items()]
    return ExperimentSet([plain, *experiments], 'detector', 'RoI pooling')


def compare_offset_rates(folder: str, schedules: dict[str, str]) -> ExperimentSet:
    """Compare learning rates of DCNv2's offsets."""
    experiments = []
    for detector, stem in {'Faster R-CNN': 'faster-rcnn', 'RetinaNet': 'retinanet'}.items():
        config = f'{folder}/{stem}_r18-w32{{}}_{folder.replace("_", "-")}.py'
        plain = Experiment(detector, 'plain', config.format('_fpn_6e'))
        experiments.append(plain)
        for rate, schedule in schedules.items():
            experiments.append(Experiment(detector, rate, config.format(f'-mdconv-c3-c5_fpn_{schedule}'), plain))
    return ExperimentSet(experiments, 'detector', "learning rate of DCNv2's offsets, relative")


def compare_deformations() -> ExperimentSet:
    """Compare strengths of deformation, the same in training and test; at 1 the runs are those of `mnist_scenes`."""
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
