# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that do not fit a model are refused, instead of being tested with random weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdcn.engine.launch import LaunchError
from mmdcn.engine.loading import check_fits, check_resumable, find_checkpoint
from mmdcn.nn import DCNv2


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(DCNv2(4, 6, 3), nn.BatchNorm2d(6))


def save(state: dict[str, Tensor], folder: Path) -> str:
    torch.save({'state_dict': state}, folder / 'x.pth')
    return str(folder / 'x.pth')


def test_a_checkpoint_with_every_parameter_is_loaded(model: nn.Module, tmp_path: Path) -> None:
    """Buffers may be missing, as in old checkpoints, and a distributed model's keys have a prefix."""
    state = {f'module.{key}': torch.randn_like(value) for key, value in model.named_parameters()}
    wrapped = nn.Module()
    wrapped.module = model
    check_fits(wrapped, save(state, tmp_path))
    assert torch.equal(model[0].weight, state['module.0.weight'])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'0.weight': torch.zeros(6, 4, 3, 2)}, r'size mismatch for 0\.weight: .*torch\.Size\(\[6, 4, 3, 2\]\)'),
        ({'0.conv_offset.weight': None}, r'0\.conv_offset\.weight is missing'),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Tensor | None], message: str, model: nn.Module, tmp_path: Path
) -> None:
    state = {key: value for key, value in (model.state_dict() | changes).items() if value is not None}
    with pytest.raises(LaunchError, match=f'x.pth does not fit the config: {message}'):
        check_fits(model, save(state, tmp_path))


def test_a_name_of_the_zoo_is_found_and_another_refused() -> None:
    found = find_checkpoint('faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes')
    assert found.startswith('mmdcn://') and find_checkpoint(found) == found
    with pytest.raises(LaunchError, match='checkpoint nothing does not exist, and the model zoo has no'):
        find_checkpoint('nothing')


def test_published_weights_cannot_be_resumed(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match='start a new one from its weights with --cfg-options load_from='):
        check_resumable(save(model.state_dict(), tmp_path))
