# SPDX-License-Identifier: Apache-2.0
"""Keys of version 1 are loaded in full, and offsets that a load would lose are reported."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints_cases import OffsetMask, dcn, nested, randomize, resnet, state_of
from mmdet.models.backbones import ResNet as MMDetResNet
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmdcn.checkpoints import accept_version1_keys
from mmdcn.engine.launch import build_runner
from mmdcn.models import ResNet
from mmdcn.nn import DCNv2


def version1_state(model: nn.Module, prefix: str = '') -> dict[str, Tensor]:
    """Return a model's random weights under the keys of mmdet v1."""
    randomize(model)
    state = {f'{prefix}{key.replace(".conv_offset", "_offset")}': value for key, value in model.state_dict().items()}
    assert sum('.conv2_offset.' in key for key in state) == 26
    return state


@pytest.fixture
def version1() -> tuple[nn.Module, dict[str, Tensor]]:
    model = resnet()
    return model, version1_state(model)


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key].to(value), value, rtol=1e-6, atol=0)


def by_load_state_dict(state: dict[str, Tensor], folder: Path) -> nn.Module:
    model = resnet()
    model.load_state_dict(state, strict=True)
    return model


def in_a_copy(state: dict[str, Tensor], folder: Path) -> nn.Module:
    model = copy.deepcopy(resnet())  # as for an average of the weights
    model.load_state_dict(state, strict=True)
    return model


def by_mmengine(state: dict[str, Tensor], folder: Path) -> nn.Module:
    torch.save(dict(state_dict=state), folder / 'old.pth')
    model = resnet()
    load_checkpoint(model, str(folder / 'old.pth'), strict=True)
    return model


def by_init_cfg(state: dict[str, Tensor], folder: Path) -> nn.Module:
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in state.items()}), folder / 'old.pth')
    checkpoint = dict(type='Pretrained', prefix='backbone.', checkpoint=str(folder / 'old.pth'))
    model = resnet(init_cfg=checkpoint)
    model.init_weights()
    return model


def within_a_detector(state: dict[str, Tensor], folder: Path) -> nn.Module:
    model = nn.ModuleDict({'backbone': resnet()})
    model.load_state_dict({f'backbone.{key}': value for key, value in state.items()}, strict=True)
    return model['backbone']


LOADERS = [by_load_state_dict, in_a_copy, by_mmengine, by_init_cfg, within_a_detector]


@pytest.mark.parametrize('load', LOADERS)
def test_mmdcns_resnet_loads_keys_of_version_1(
    load: Callable, version1: tuple, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    model, state = version1
    assert_same_weights(load(state, tmp_path), model)
    assert 'NOT loaded' not in log.text


@MODELS.register_module(name='TestCheckpointsModel')
class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet(MMDetResNet)

    def forward(self, *args: object, **kwargs: object) -> None:
        """Do nothing: this model is only loaded."""


def test_the_tools_load_keys_of_version_1_into_any_model(version1: tuple, tmp_path: Path) -> None:
    model, state = version1
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in state.items()}), tmp_path / 'old.pth')
    cfg = Config(
        dict(model=dict(type='TestCheckpointsModel'), work_dir=str(tmp_path), launcher='none', default_scope=None)
    )
    cfg.experiment_name = tmp_path.name
    runner = build_runner(cfg)
    runner.load_checkpoint(str(tmp_path / 'old.pth'), strict=True)
    assert_same_weights(runner.model.backbone, model)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('load', ['torch', 'mmengine'])
def test_offsets_that_are_lost_are_reported_aloud(
    load: str, version1: tuple, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    torch.save(version1[1], tmp_path / 'old.pth')
    model = resnet(MMDetResNet)
    if load == 'torch':
        model.load_state_dict(version1[1], strict=False)
    else:
        load_checkpoint(model, str(tmp_path / 'old.pth'))
    records = [record for record in log.records if 'NOT loaded' in record.message]
    assert len(records) == 13
    for record, layer in ((records[0], 'layer2.0.conv2'), (records[-1], 'layer4.2.conv2')):
        assert record.levelname == 'WARNING'
        assert f'The offsets of {layer} are NOT loaded' in record.message
        assert f'{layer}_offset.weight, {layer}_offset.bias' in record.message
        assert 'convert_checkpoint.py' in record.message
    accept_version1_keys(model)
    model.load_state_dict(version1[1], strict=True)
    assert_same_weights(model, version1[0])


def test_lost_offsets_of_other_projects_are_reported_too(log: pytest.LogCaptureFixture) -> None:
    nested('block', dcn(3)).load_state_dict(state_of(OffsetMask(), 'charlesshang'), strict=False)
    assert 'block are NOT loaded' in log.text
    assert 'block.conv_offset_mask.weight' in log.text


@pytest.mark.parametrize('kind', [ResNet, MMDetResNet])
def test_a_plain_backbone_is_loaded_without_a_word_of_ours(kind: type, log: pytest.LogCaptureFixture) -> None:
    plain = MMDetResNet(50, base_channels=4).state_dict()
    resnet(kind).load_state_dict(plain, strict=False)
    assert 'NOT loaded' not in log.text


def test_mmcvs_own_layer_loses_keys_of_version_1(version1: tuple) -> None:
    # When torch or mmcv mends this, the note in mmdcn/checkpoints/version1_keys.py wants a new beginning.
    lost = resnet(MMDetResNet, 'DCNv2').load_state_dict(version1[1], strict=False)
    assert sum(key.endswith('conv2.conv_offset.weight') for key in lost.missing_keys) == 13
    assert sum(key.endswith('conv2_offset.weight') for key in lost.unexpected_keys) == 13


def test_offsets_that_are_loaded_under_another_name_are_not_reported(log: pytest.LogCaptureFixture) -> None:
    layer = randomize(nn.ModuleDict({'conv2': DCNv2(4, 6, 3)}))
    nn.utils.parametrizations.weight_norm(layer['conv2'].conv_offset)
    layer.load_state_dict(layer.state_dict())
    assert 'NOT loaded' not in log.text
