# SPDX-License-Identifier: Apache-2.0
"""The layers: mmcv's to a user and to the ecosystem, on mmdcn's operator."""

import subprocess
import sys
from collections.abc import Callable

import mmcv.ops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import build_conv_layer
from mmdet.models.backbones import ResNet
from mmengine.optim import build_optim_wrapper

from mmdcn import convert_model, modules, ops, reference

LAYERS = {
    'DCN': (modules.DeformConv2dPack, mmcv.ops.DeformConv2dPack),
    'DCNv2': (modules.ModulatedDeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack),
}
SETTINGS = [
    dict(in_channels=4, out_channels=6, kernel_size=3, padding=1),
    dict(in_channels=4, out_channels=2, kernel_size=1, deform_groups=2),
    dict(in_channels=6, out_channels=4, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), groups=2),
    dict(in_channels=6, out_channels=9, kernel_size=3, padding=2, dilation=2, groups=3, deformable_groups=2),
]


def random_pair(name: str, settings: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """In float64, whose rounding is far below what is allowed for, whatever the order of the sums."""
    ours, theirs = (layer(**settings, bias=False).double() for layer in LAYERS[name])
    state = {key: torch.randn_like(value) for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    return ours, theirs


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('settings', SETTINGS, ids=str)
@pytest.mark.parametrize('name', LAYERS)
def test_a_random_state_dict_gives_the_output_and_the_gradients_of_mmcv(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    ours, theirs = random_pair(name, settings)
    x = torch.randn(2, settings['in_channels'], 7, 9, dtype=torch.float64)
    outputs, gradients = [], []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        outputs.append(layer(leaf))
        seed = torch.linspace(-1, 1, outputs[-1].numel(), dtype=torch.float64).view_as(outputs[-1])
        gradients.append(torch.autograd.grad(outputs[-1], [leaf, *layer.parameters()], seed))
    for got, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


INTEGERS = [np.int64, np.uint8, torch.tensor]


@pytest.mark.parametrize('integer', INTEGERS)
def test_every_kind_of_integer_is_an_argument_of_a_function(integer: Callable) -> None:
    torch.manual_seed(0)
    x, offset, weight = torch.randn(1, 4, 7, 9), torch.randn(1, 18, 4, 9), torch.randn(6, 4, 3, 3)
    rois, one, two = torch.tensor([[0, 1.0, 1.0, 4.0, 3.0]]), integer(1), integer(2)
    torch.testing.assert_close(
        ops.deform_conv2d(x, offset, weight, stride=(two, one), padding=one, dilation=one),
        ops.deform_conv2d(x, offset, weight, stride=(2, 1), padding=1),
        rtol=0, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        ops.deform_roi_pool(x, rois, None, (two, 3), sampling_ratio=two),
        ops.deform_roi_pool(x, rois, None, (2, 3), sampling_ratio=2),
        rtol=0, atol=0,
    )  # fmt: skip
    assert ops.deform_roi_pool(x, rois, None, two).shape == reference.deform_roi_pool(x, rois, None, two).shape


@pytest.mark.parametrize('integer', INTEGERS[:2])
@pytest.mark.parametrize('name', LAYERS)
def test_every_kind_of_integer_is_an_argument_of_a_layer(name: str, integer: Callable) -> None:
    one, two, three = map(integer, (1, 2, 3))
    layer = LAYERS[name][0](4, 6, three, stride=two, padding=(one, one), dilation=one, groups=two, deform_groups=two)
    plain = LAYERS[name][0](4, 6, 3, stride=2, padding=1, groups=2, deform_groups=2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 7, 9)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    rois = torch.tensor([[0, 1.0, 1.0, 4.0, 3.0]])
    assert modules.DeformRoIPoolPack(two, 4, 8, sampling_ratio=two)(x, rois).shape == (1, 4, 2, 2)


def test_a_config_finds_each_layer_without_any_import() -> None:
    code = """
import mmdet.models
from mmengine.registry import DefaultScope
DefaultScope.get_instance('test', scope_name='mmdet')
for name in ('DCN', 'DCNv2', 'ModulatedDCN'):
    dcn = dict(type=f'mmdcn.{name}', deform_groups=1)
    backbone = mmdet.models.ResNet(50, dcn=dcn, stage_with_dcn=(0, 0, 0, 1))
    print(type(backbone.layer4[0].conv2).__module__)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-3:] == 3 * ['mmdcn.modules.deform_conv2d']


@pytest.mark.parametrize('name', LAYERS)
def test_the_layer_is_an_instance_of_the_class_of_mmcv(name: str) -> None:
    layer = build_conv_layer(dict(type=f'mmdcn.{name}'), 4, 4, kernel_size=3)
    assert isinstance(layer, LAYERS[name][1])


@pytest.mark.parametrize('name', LAYERS)
def test_dcn_offset_lr_mult_reaches_the_offsets_and_nothing_else(name: str) -> None:
    model = torch.nn.Sequential(build_conv_layer(dict(type=f'mmdcn.{name}'), 4, 4, kernel_size=3))
    settings = dict(optimizer=dict(type='SGD', lr=1.0), paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
    wrapper = build_optim_wrapper(model, settings)
    rates = {id(group['params'][0]): group['lr'] for group in wrapper.optimizer.param_groups}
    for parameter_name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.1 if 'conv_offset' in parameter_name else 1.0), parameter_name


def test_a_new_dcn_is_a_convolution() -> None:
    torch.manual_seed(0)
    layer = modules.DeformConv2dPack(4, 6, 3, padding=1, bias=True).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_a_new_dcnv2_is_half_a_convolution() -> None:
    torch.manual_seed(0)
    layer = modules.ModulatedDeformConv2dPack(4, 6, 3, padding=1, bias=False).double()
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1) / 2)


@pytest.mark.parametrize('name', LAYERS)
def test_from_scratch_offsets_are_zero_and_weights_follow_kaiming(name: str) -> None:
    """So do those of a plain convolution in mmdet's ResNet."""
    torch.manual_seed(0)
    backbone = ResNet(50, dcn=dict(type=f'mmdcn.{name}'), stage_with_dcn=(False, False, False, True))
    backbone.init_weights()
    layer, plain = backbone.layer4[1].conv2, backbone.layer3[1].conv2
    assert layer.conv_offset.weight.abs().max() == 0
    assert layer.conv_offset.bias.abs().max() == 0
    # Kaiming's standard deviation is sqrt(2 / fan_out); over 2.4 million draws its estimate is within 1 % of it.
    for conv in (layer, plain):
        fan_out = conv.weight.shape[0] * 9
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)


@pytest.mark.parametrize('name', LAYERS)
def test_loading_a_checkpoint_says_nothing(name: str, capfd: pytest.CaptureFixture) -> None:
    layer = build_conv_layer(dict(type=f'mmdcn.{name}'), 4, 4, kernel_size=3)
    layer.load_state_dict(layer.state_dict())
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('name', LAYERS)
def test_under_autocast_the_offsets_are_predicted_in_float32(name: str) -> None:
    torch.manual_seed(0)
    layer = build_conv_layer(dict(type=f'mmdcn.{name}'), 4, 4, kernel_size=3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight)
    x = torch.randn(1, 4, 5, 7).bfloat16()
    predicted = []
    layer.conv_offset.register_forward_hook(lambda *call: predicted.append(call[-1]))
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(x)
    expected = F.conv2d(x.float(), layer.conv_offset.weight, layer.conv_offset.bias, padding=1)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(predicted[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize('name', LAYERS)
def test_an_image_without_a_batch_is_refused_by_name(name: str) -> None:
    layer = build_conv_layer(dict(type=f'mmdcn.{name}'), 4, 6, 3, padding=1)
    with pytest.raises(ValueError, match=r'^input must have 4 dimensions \[B, C_in, H, W\], got shape \[4, 9, 8\]'):
        layer(torch.zeros(4, 9, 8))


@pytest.mark.parametrize('name', ['DeformConv2dPack', 'ModulatedDeformConv2dPack'])
def test_any_module_may_predict_the_offsets(name: str) -> None:
    layer = getattr(mmcv.ops, name)(4, 6, 3, padding=1)
    channels = layer.conv_offset.out_channels
    layer.conv_offset = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, channels, 1))
    x = torch.randn(2, 4, 7, 8)
    expected = layer(x)
    torch.testing.assert_close(convert_model(layer)(x), expected)


def test_a_predictor_without_a_bias_can_be_reset() -> None:
    layer = mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3)
    layer.conv_offset = torch.nn.Conv2d(4, 27, 3, bias=False)
    convert_model(layer).init_weights()
    assert not layer.conv_offset.weight.any()
