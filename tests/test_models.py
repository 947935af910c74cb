# SPDX-License-Identifier: Apache-2.0
"""The backbones."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models.backbones import ResNet as MMDetResNet
from mmdet.models.backbones import ResNetV1d as MMDetResNetV1d
from mmengine.config import ConfigDict
from torch import nn

from mmdcn.models import ResNet, ResNetV1d
from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack

DCN = dict(type='mmdcn.DCNv2', deform_groups=1)
C3_C5 = (False, True, True, True)
MENDED = 'mended upstream: drop the row in docs/plugin.md'


def resnet(
    depth: int, layer: dict | None = DCN, stages: Any = C3_C5, cls: Callable = ResNet, **settings: Any
) -> ResNet:
    return cls(depth=depth, base_channels=4, dcn=layer, stage_with_dcn=stages, **settings)


def deformable(backbone: nn.Module) -> list[str]:
    return [name for name, layer in backbone.named_modules() if hasattr(layer, 'deform_groups')]


def run(backbone: ResNet) -> tuple[torch.Tensor, ...]:
    """Move the offsets away from zero, and run on images of lopsided size."""
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if 'conv_offset' in name:
            nn.init.normal_(parameter, std=0.1)
    return backbone(torch.randn(2, 3, 45, 70, dtype=parameter.dtype))


@pytest.mark.parametrize(('depth', 'count'), [(18, 6), (34, 13), (50, 13), (101, 30)])
def test_every_block_of_the_chosen_stages_has_one_deformable_layer(depth: int, count: int) -> None:
    layers = deformable(resnet(depth))
    assert len(layers) == count
    assert all(name.endswith('conv2') and not name.startswith('layer1') for name in layers)


@pytest.mark.parametrize('stages', [(False, True, False, [True, False]), [(0, 0), (1, 1), 0, (1, 0)]], ids=str)
def test_any_single_block_may_be_deformable(stages: Any) -> None:
    assert deformable(resnet(18, stages=stages)) == ['layer2.0.conv2', 'layer2.1.conv2', 'layer4.0.conv2']


@pytest.mark.parametrize('settings', [{}, dict(style='caffe'), dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))])
def test_at_depth_50_the_layers_are_those_that_mmdet_builds(settings: dict) -> None:
    def geometry(backbone: nn.Module) -> dict[str, str]:
        return {name: repr(module) for name, module in backbone.named_modules() if not list(module.children())}

    layer = dict(DCN, deform_groups=2, groups=2)
    ours = resnet(50, layer, **settings)
    theirs = resnet(50, layer, cls=MMDetResNet, **settings)
    assert geometry(ours) == geometry(theirs)
    assert [repr(ours.get_submodule(name)) for name in deformable(ours)] == [
        repr(theirs.get_submodule(name)) for name in deformable(theirs)
    ]
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize('depth', [18, 50])
def test_without_dcn_it_is_the_resnet_of_mmdet(depth: int) -> None:
    torch.manual_seed(0)
    ours, theirs = ResNet(depth, base_channels=4), MMDetResNet(depth, base_channels=4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 33, 47)
    for got, expected in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_v1d_has_the_parameters_of_that_of_mmdet() -> None:
    ours, theirs = resnet(50, cls=ResNetV1d), resnet(50, cls=MMDetResNetV1d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert 'stem.0.weight' in ours.state_dict()


@pytest.mark.parametrize(
    ('depth', 'style', 'plain'),
    [(50, 'pytorch', ['layer2.0', 'layer3.0', 'layer4.0']), (50, 'caffe', []), (18, 'pytorch', [])],
)
def test_fallback_on_stride_keeps_the_strided_layers_plain_and_no_others(
    depth: int, style: str, plain: list[str]
) -> None:
    backbone = resnet(depth, dict(DCN, fallback_on_stride=True), style=style)
    fallen = set(deformable(resnet(depth, style=style))) - set(deformable(backbone))
    assert sorted(fallen) == [f'{name}.conv2' for name in plain]
    for name in deformable(backbone):
        assert backbone.get_submodule(name).stride == (1, 1)


def test_mmdet_makes_all_blocks_but_one_deformable_and_edits_the_config() -> None:
    layer = dict(DCN, fallback_on_stride=True)
    backbone = resnet(50, layer, cls=MMDetResNet)
    assert len(deformable(backbone)) == 12, MENDED
    assert max(backbone.layer3[0].conv2.stride) == 2 and 'layer3.0.conv2' in deformable(backbone), MENDED
    assert 'fallback_on_stride' not in layer, MENDED


@pytest.mark.parametrize('depth', [18, 50])
def test_the_config_is_left_as_it_is_and_builds_the_same_twice(depth: int) -> None:
    layer = ConfigDict(DCN, fallback_on_stride=True)
    before = deepcopy(layer)
    first, second = (deformable(resnet(depth, layer)) for _ in range(2))
    assert first == second
    assert layer == before


@pytest.mark.parametrize('depth', [18, 34])
def test_mmdet_has_no_dcn_at_depths_18_and_34(depth: int) -> None:
    with pytest.raises(AssertionError, match='Not implemented yet'):  # else: MENDED
        resnet(depth, cls=MMDetResNet)


def test_a_conv_cfg_beside_dcn_is_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match=r"conv_cfg must be None where dcn is given, got .*'ConvWS'.*remove one"):
        resnet(18, conv_cfg=dict(type='ConvWS'))


def test_a_stage_with_too_few_bools_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r'stage_with_dcn\[3\] must be one bool, or one for each of the 3 blocks'):
        resnet(50, stages=(False, False, False, (True, True)))


@pytest.mark.parametrize('depth', [18, 50])
def test_checkpointing_gives_the_same_gradients(depth: int) -> None:
    torch.manual_seed(0)
    plain, checkpointed = (resnet(depth, with_cp=with_cp).double() for with_cp in (False, True))
    checkpointed.load_state_dict(plain.state_dict())
    for backbone in (plain, checkpointed):
        # Against a ramp: the sum of a normalised map is constant.
        ramps = ((feature * torch.linspace(-1, 1, feature.numel()).view_as(feature)).sum() for feature in run(backbone))
        sum(ramps).backward()
    for (name, got), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        largest = expected.grad.abs().max().item()
        assert largest > 0, name
        # The same sums in another order: float64 has digits to spare for 1e-9.
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-9 * largest)


def test_plugins_stand_after_the_deformable_layer() -> None:
    plugin = dict(cfg=dict(type='ContextBlock', ratio=0.5), stages=C3_C5, position='after_conv2')
    backbone = resnet(50, plugins=[plugin])
    order: list[str] = []
    block = backbone.layer2[1]
    for name in ('conv2', 'context_block', 'conv3'):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    run(backbone)
    assert isinstance(block.conv2, ModulatedDeformConv2dPack)
    assert order == ['conv2', 'context_block', 'conv3']


def wide_stage(name: str, cls: Callable = ResNet, **settings: Any) -> MMDetResNet:
    """Build a ResNet with one deformable layer, of enough weights for statistics."""
    return cls(
        50, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,), dcn=dict(type=name),
        stage_with_dcn=(False, True), **settings,
    )  # fmt: skip


def deviation_from_kaiming(weight: torch.Tensor) -> float:
    """Return the weight's standard deviation relative to sqrt(2 / fan_out)."""
    return weight.std().item() / (2 / (weight.shape[0] * 9)) ** 0.5


@pytest.mark.parametrize('settings', [{}, dict(zero_init_residual=False)], ids=str)
@pytest.mark.parametrize('name', ['mmdcn.DCN', 'mmdcn.DCNv2'])
def test_from_scratch_offsets_are_zero_and_weights_are_those_of_kaiming(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    backbone = wide_stage(name, **settings)
    backbone.init_weights()
    for block in backbone.layer2:
        assert all(parameter.abs().max() == 0 for parameter in block.conv2.conv_offset.parameters())
        # Of 147,456 normal draws the standard deviation is known to 1 / sqrt(2 * 147456) = 0.2 %.
        assert deviation_from_kaiming(block.conv2.weight) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize('depth', [18, 50])
def test_from_scratch_the_last_norm_of_each_block_is_zero(depth: int) -> None:
    backbone = resnet(depth)
    backbone.init_weights()
    last = 'norm2' if depth == 18 else 'norm3'
    assert all(getattr(block, last).weight.abs().max() == 0 for block in (*backbone.layer1, *backbone.layer4))


def test_mmcv_draws_offsets_for_dcn_and_too_small_weights_for_dcnv2() -> None:
    """The offsets should be zero, and the weights' deviation that of Kaiming's initialization."""
    torch.manual_seed(0)
    backbones = {name: wide_stage(name, MMDetResNet) for name in ('DCN', 'DCNv2')}
    for backbone in backbones.values():
        backbone.init_weights()
    first, second = (backbone.layer2[1].conv2 for backbone in backbones.values())
    assert first.conv_offset.weight.abs().max() > 0.1, MENDED
    assert deviation_from_kaiming(second.weight) < 0.5, MENDED


@pytest.mark.parametrize('name', ['mmdcn.DCN', 'mmdcn.DCNv2'])
def test_pretrained_plain_convolutions_are_loaded_and_offsets_are_zero(tmp_path: Path, name: str) -> None:
    plain = resnet(18, None)
    torch.save(plain.state_dict(), tmp_path / 'resnet18.pth')
    checkpoint = dict(type='Pretrained', checkpoint=str(tmp_path / 'resnet18.pth'))
    backbone = resnet(18, dict(type=name), init_cfg=checkpoint)
    backbone.init_weights()
    state = backbone.state_dict()
    for key, expected in plain.state_dict().items():
        torch.testing.assert_close(state.pop(key), expected, rtol=0, atol=0)
    assert {key.split('.')[-2] for key in state} == {'conv_offset'}
    assert all(value.abs().max() == 0 for value in state.values())
    assert isinstance(backbone.layer4[1].conv2, DeformConv2dPack | ModulatedDeformConv2dPack)
