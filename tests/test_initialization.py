# SPDX-License-Identifier: Apache-2.0
"""From scratch a layer begins as a convolution, whatever surrounds it; and what is loaded stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv.ops
import pytest
import torch
from mmdet.models import backbones, dense_heads, necks
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

import mmdcn
from mmdcn import modules

DCN = dict(type='mmdcn.DCNv2')
NAMES = ['DeformConv2dPack', 'ModulatedDeformConv2dPack']
HEAD = dict(num_classes=3, in_channels=8, feat_channels=8, norm_cfg=dict(type='BN'))


def mmseg_backbone(name: str, **settings: Any) -> nn.Module:
    models = pytest.importorskip('mmseg.models')
    with DefaultScope.overwrite_default_scope('mmseg'):
        return getattr(models.backbones, name)(**settings)


def rtmdet() -> nn.Module:
    generator = dict(type='MlvlPointGenerator', offset=0, strides=[8])
    coder = dict(type='DistancePointBBoxCoder')
    return dense_heads.RTMDetHead(**HEAD, conv_cfg=DCN, anchor_generator=generator, bbox_coder=coder)


STAGES = dict(depth=50, base_channels=8, dcn=DCN, stage_with_dcn=(False, True, True, True))
PARTS: dict[str, Callable[[], nn.Module]] = {
    'FPN': lambda: necks.FPN([8, 8], 8, 2, conv_cfg=DCN),
    'HRFPN': lambda: necks.HRFPN([8, 8], 8, conv_cfg=DCN),
    'Res2Net': lambda: backbones.Res2Net(**STAGES),
    'CSPDarknet': lambda: backbones.CSPDarknet(widen_factor=0.125, deepen_factor=0.33, conv_cfg=DCN),
    'MobileNetV2': lambda: backbones.MobileNetV2(widen_factor=0.25, conv_cfg=DCN),
    'EfficientNet': lambda: backbones.EfficientNet('b0', conv_cfg=DCN),
    'DetectoRS': lambda: backbones.DetectoRS_ResNet(**STAGES),
    'RTMDet, which draws by isinstance': rtmdet,
    'NAS-FCOS, which draws by isinstance': lambda: necks.NASFCOS_FPN([8, 8, 8], 8, 4, 1, conv_cfg=DCN),
    'ResNeSt of mmseg': lambda: mmseg_backbone('ResNeSt', **STAGES),
    'ResNetV1c of mmseg': lambda: mmseg_backbone('ResNetV1c', **STAGES),
    'MobileNetV2 of mmseg': lambda: mmseg_backbone('MobileNetV2', widen_factor=0.25, conv_cfg=DCN),
}


def find_predictors(model: nn.Module) -> list[nn.Module]:
    return [layer.conv_offset for layer in model.modules() if hasattr(layer, 'conv_offset')]


def largest_parameter(parts: list[nn.Module]) -> float:
    return max(parameter.abs().max().item() for part in parts for parameter in part.parameters())


@pytest.mark.parametrize('name', PARTS)
def test_in_any_model_part_offsets_are_zero_and_weights_follow_kaiming(name: str) -> None:
    """So do those of a plain convolution."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        part = PARTS[name]()
        part.init_weights()
    assert largest_parameter(find_predictors(part)) == 0
    for layer in (layer for layer in part.modules() if hasattr(layer, 'conv_offset')):
        # Kaiming's standard deviation is sqrt(2 / fan_out). Of n normal draws it is known to 1 / sqrt(2 * n), and all
        # of some 100 layers are within 5 of those.
        fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
        known = 5 / (2 * layer.weight.numel()) ** 0.5
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=known)


def test_of_mmcv_the_offsets_in_a_container_are_not_zero() -> None:
    with DefaultScope.overwrite_default_scope('mmdet'):
        neck = necks.FPN([8, 8], 8, 2, conv_cfg=dict(type='DCNv2'))
    neck.init_weights()
    assert largest_parameter(find_predictors(neck)) > 0.1, 'mended upstream: drop the row in docs/plugin.md'


class Parent(BaseModule):
    """Has its part in a plain container, and may draw weights by hand."""

    def __init__(self, part: nn.Module, init_cfg: Any = None, draw: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__(init_cfg)
        self.plain = nn.ModuleDict(dict(part=nn.Sequential(part)))
        self.draw = draw

    def init_weights(self) -> None:
        super().init_weights()
        if self.draw:
            for module in self.modules():
                self.draw(module)


def draw_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight)


NORMAL = dict(type='Normal', std=1.0, bias=1.0)
WAYS: dict[str, dict] = {
    'by the name of the class': dict(init_cfg=dict(NORMAL, layer=['Conv2d', 'Linear'])),
    'all that has a weight': dict(init_cfg=dict(NORMAL, layer='None', override=dict(NORMAL, name='plain'))),
    'by isinstance': dict(draw=draw_convolution),
    'by reset_parameters': dict(draw=lambda module: getattr(module, 'reset_parameters', list)()),
    'by apply': dict(draw=lambda module: module.apply(draw_convolution)),
    'each parameter': dict(draw=lambda module: [nn.init.normal_(parameter) for parameter in module.parameters()]),
}
ROI_POOLING = dict(output_size=(2, 3), output_channels=4, deform_fc_channels=8)


def find_roi_predictors(layer: nn.Module) -> list[nn.Module]:
    """Return the linear layers whose outputs are offsets and masks, before the activations."""
    stacks = [layer.offset_fc, *([layer.mask_fc] if hasattr(layer, 'mask_fc') else [])]
    return [[part for part in stack if hasattr(part, 'weight')][-1] for stack in stacks]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('switch', ['registered', 'converted'])
@pytest.mark.parametrize('name', [*NAMES, 'DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack'])
def test_however_a_parent_draws_its_weights_offsets_stay_zero(name: str, switch: str, way: str) -> None:
    """Masks stay one half."""
    settings = ROI_POOLING if 'RoI' in name else dict(in_channels=4, out_channels=6, kernel_size=3)
    layer = getattr(modules if switch == 'registered' else mmcv.ops, name)(**settings)
    parent = Parent(mmdcn.convert_model(layer), **WAYS[way])
    parent.init_weights()
    assert largest_parameter(find_roi_predictors(layer) if 'RoI' in name else find_predictors(parent)) == 0


@pytest.mark.parametrize('name', NAMES)
def test_a_parent_may_initialize_the_offsets_by_their_name(name: str) -> None:
    class Own(BaseModule):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Sequential(getattr(modules, name)(4, 6, 3))

        def init_weights(self) -> None:
            nn.init.constant_(self.plain[0].conv_offset.bias, 0.25)

    own = Own()
    own.init_weights()
    assert largest_parameter(find_predictors(own)) == 0.25


@pytest.mark.parametrize('name', NAMES)
def test_outside_of_an_initialization_a_predictor_is_a_module_as_any(name: str) -> None:
    model = nn.Sequential(getattr(modules, name)(4, 6, 3))
    model.apply(draw_convolution)
    assert [key for key, _ in model.named_modules()] == ['', '0', '0.conv_offset']
    assert [key for key, _ in model.named_parameters()][-2:] == ['0.conv_offset.weight', '0.conv_offset.bias']
    assert largest_parameter(find_predictors(model)) > 0


@pytest.mark.parametrize('name', NAMES)
def test_an_initialization_of_the_layer_alone_is_one_from_scratch(name: str) -> None:
    layer = getattr(modules, name)(4, 6, 3)
    randomised(layer)
    layer.init_weights()
    assert largest_parameter(find_predictors(layer)) == 0


def randomised(model: nn.Module) -> dict[str, Tensor]:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('container', [nn.Sequential, lambda part: part], ids=['in a container', 'direct child'])
def test_a_loaded_checkpoint_is_not_reset_by_an_initialization(container: Callable, name: str, tmp_path: Path) -> None:
    def make(init_cfg: Any = None) -> nn.Module:
        parent = BaseModule(init_cfg)
        parent.part = container(getattr(modules, name)(4, 6, 3))
        return parent

    state = randomised(make())
    torch.save(state, tmp_path / 'checkpoint.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'checkpoint.pth'))
    by_its_own, by_a_grandparent, before = make(pretrained), BaseModule(dict(NORMAL, layer='Conv2d')), make()
    by_a_grandparent.parent = make(pretrained)
    before.load_state_dict(state)
    for model in (by_its_own, by_a_grandparent, before):
        for _ in range(2):
            model.init_weights()
    for model in (by_its_own, by_a_grandparent.parent, before):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)
