# SPDX-License-Identifier: Apache-2.0
"""Offsets in the logs of a training."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from small_detectors import batch, build, fcos_config
from torch import nn
from torch.utils.data import DataLoader

import mmdcn


class Nothing(BaseMetric):
    """Measures nothing."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, results: list) -> dict:
        return dict(count=len(results))


def detector(**settings: Any) -> nn.Module:
    return build(ConfigDict(fcos_config(**settings)))


def train(folder: Path, model: nn.Module, lr: float = 1e-3, **hook: Any) -> Runner:
    """Train for four iterations, and validate once."""
    loader, val_loader = (DataLoader([0] * count, collate_fn=lambda _: deepcopy(batch())) for count in (4, 1))
    runner = Runner(
        model=model, work_dir=str(folder), train_dataloader=loader, val_dataloader=val_loader,
        train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg=dict(), val_evaluator=[Nothing()],
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr)), default_scope='mmdet',
        visualizer=dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name=str(folder)),
        custom_hooks=[dict(type='mmdcn.OffsetVisualizationHook', **hook)], experiment_name=folder.name,
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=1)),
    )  # fmt: skip
    runner.train()
    return runner


def scalars(folder: Path) -> list[dict]:
    (log,) = folder.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry for entry in entries if any(key.startswith('offsets/') for key in entry)]


def warnings_of(folder: Path) -> list[str]:
    (log,) = folder.glob('*/*.log')
    return [line for line in log.read_text().splitlines() if 'have run away' in line]


@pytest.mark.parametrize('layer', ['mmdcn.DCN', 'mmdcn.DCNv2'])
def test_statistics_of_every_layer_and_pictures_reach_the_backends(layer: str, tmp_path: Path) -> None:
    train(tmp_path, detector(layer=layer), interval=2)
    entries = scalars(tmp_path)
    assert [entry['step'] for entry in entries] == [2, 4]
    layers = [f'backbone.layer{stage}.{block}.conv2' for stage in (2, 3) for block in (0, 1)]
    measures = ('mean', 'percentile_99', 'relative', 'outside')
    assert set(entries[0]) == {'step', *(f'offsets/{name}/{measure}' for name in layers for measure in measures)}
    assert (
        0
        < entries[1]['offsets/backbone.layer2.0.conv2/mean']
        < entries[1]['offsets/backbone.layer2.0.conv2/percentile_99']
    )
    pictures = sorted(path.name for path in tmp_path.glob('*/vis_data/vis_image/*'))
    assert pictures == ['offset_maps_4.png', 'offset_points_4.png']
    assert warnings_of(tmp_path) == []


def test_offsets_that_run_away_are_warned_of_once(tmp_path: Path) -> None:
    """The warning names the layer and the remedy."""
    model = detector()
    with torch.no_grad():
        model.backbone.layer3[1].conv2.conv_offset.bias[:18] = 40.0  # its map has 3 x 5 pixels
    train(tmp_path, model, interval=1, draw=False)
    (warning,) = warnings_of(tmp_path)
    assert 'WARNING - The offsets of backbone.layer3.1.conv2 have run away: 100% of its samples' in warning
    assert 'dcn_offset_lr_mult=0.1' in warning
    assert not list(tmp_path.glob('*/vis_data/vis_image/*'))


def test_a_learning_rate_that_drives_offsets_away_is_warned_of(tmp_path: Path) -> None:
    train(tmp_path, detector(), lr=3.0, interval=1, draw=False)
    assert warnings_of(tmp_path)


def test_offsets_that_are_not_finite_are_warned_of(tmp_path: Path) -> None:
    model = detector()
    with torch.no_grad():
        model.backbone.layer2[0].conv2.conv_offset.bias[0] = float('nan')
    train(tmp_path, model, interval=4, draw=False)
    assert any('backbone.layer2.0.conv2 have run away: they are not finite' in line for line in warnings_of(tmp_path))


def test_nothing_stays_attached_and_the_training_is_the_same(tmp_path: Path) -> None:
    weights = []
    for name, interval in (('often', 1), ('never', 99)):
        model = detector()
        train(tmp_path / name, model, interval=interval)
        weights.append(model.state_dict())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), 'interval must be at least 1, got 0'),
        (dict(max_outside=30), 'max_outside must be from 0 to 1, got 30'),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmdcn.OffsetVisualizationHook(**arguments)


def test_a_config_finds_the_hook_by_its_name() -> None:
    assert type(HOOKS.build(dict(type='mmdcn.OffsetVisualizationHook'))) is mmdcn.OffsetVisualizationHook
