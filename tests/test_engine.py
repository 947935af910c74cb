# SPDX-License-Identifier: Apache-2.0
"""What mmengine does with the layers: parameter groups, and counts of operations."""

import subprocess
import sys
from typing import Any

import mmcv.ops
import pytest
import torch
from mmcv.ops.saconv import SAConv2d
from mmdet.models.dense_heads.atss_vlfusion_head import Conv3x3Norm, DyConv
from mmdet.models.dense_heads.fovea_head import FeatureAlign
from mmdet.models.dense_heads.guided_anchor_head import FeatureAdaption
from mmdet.models.necks.dyhead import DyHeadBlock
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from small_detectors import backbone, build, fcos_config, images
from torch import nn

from mmdcn import modules

CONSTRUCTOR = 'mmdcn.DCNOptimWrapperConstructor'
RATES = dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2.0, bias_decay_mult=0.0, norm_decay_mult=0.5)
MENDED = 'mended upstream: drop the row in docs/plugin.md'


def get_rates(
    model: nn.Module, constructor: str = 'DefaultOptimWrapperConstructor', **paramwise: Any
) -> dict[str, tuple]:
    """Return the learning rate and the weight decay of each parameter, by name."""
    cfg = dict(constructor=constructor, optimizer=dict(type='SGD', lr=1.0, weight_decay=1.0), paramwise_cfg=paramwise)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optim_wrapper(model, cfg).optimizer
    return {
        names[parameter]: (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for parameter in group['params']
    }


def find_slowed_modules(model: nn.Module) -> set[str]:
    """Return the modules that `dcn_offset_lr_mult` reaches."""
    rates = get_rates(model, CONSTRUCTOR, dcn_offset_lr_mult=0.1)
    return {name.rpartition('.')[0] for name, (rate, _) in rates.items() if rate == 0.1}


@pytest.mark.parametrize('constructor', ['DefaultOptimWrapperConstructor', CONSTRUCTOR])
@pytest.mark.parametrize(
    'paramwise',
    [RATES, dict(RATES, flat_decay_mult=0.25, custom_keys={'layer2.1': dict(lr_mult=5.0, decay_mult=3.0)})],
    ids=['rules', 'custom_keys too'],
)
@pytest.mark.parametrize('name', ['DCN', 'DCNv2'])
def test_the_groups_are_those_of_the_layers_of_mmcv(constructor: str, paramwise: dict, name: str) -> None:
    ours, theirs = (get_rates(build(backbone(layer)), constructor, **paramwise) for layer in (f'mmdcn.{name}', name))
    assert ours == theirs
    assert ours['layer3.1.conv2.conv_offset.weight'] == (0.1, 1.0)
    assert ours['layer3.1.conv2.conv_offset.bias'] == (0.1, 1.0)
    assert ours['layer3.1.conv2.weight'] == (1.0, 1.0)
    assert ours['layer3.1.bn2.bias'] == (1.0, 0.5)


def centripetal_head() -> nn.Module:
    return build(dict(type='CentripetalHead', num_classes=2, in_channels=4, corner_emb_channels=0, num_feat_levels=1))


def build_head(name: str, **settings: Any) -> nn.Module:
    return build(dict(type=name, num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1, **settings))


def tood_head() -> nn.Module:
    anchors = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8])
    return build_head('TOODHead', num_dcn=1, anchor_generator=anchors, norm_cfg=None)


BESIDE_THEIR_LAYER = {
    'FoveaBox': (lambda: FeatureAlign(4, 4), {'conv_offset'}),
    'guided anchoring': (lambda: FeatureAdaption(4, 4), {'conv_offset'}),
    'DyHead': (lambda: DyHeadBlock(16, 16), {'spatial_conv_offset'}),
    'GLIP': (
        lambda: DyConv(lambda i, o, s: Conv3x3Norm(i, o, s, use_dcn=True), 16, 16, use_dcn=True),
        {'offset'},
    ),
    'DetectoRS': (lambda: SAConv2d(4, 4, 3, padding=1, use_deform=True), {'offset_s', 'offset_l'}),
    'CentripetalNet': (centripetal_head, {'tl_dcn_offset.0.conv', 'br_dcn_offset.0.conv'}),
    'TOOD': (tood_head, {'inter_convs.0.conv.conv_offset', 'reg_offset_module.0', 'reg_offset_module.2'}),
}
NO_OFFSETS = {
    'RepPoints: points have a loss': lambda: build_head(
        'RepPointsHead', point_feat_channels=8, norm_cfg=dict(type='GN', num_groups=4)
    ),
    'VFNet: boxes have a loss': lambda: build_head('VFNetHead', norm_cfg=dict(type='GN', num_groups=4)),
    'CenterNet: offsets of centres': lambda: build(
        dict(type='CenterNetHead', num_classes=2, in_channels=4, feat_channels=4)
    ),
}


@pytest.mark.parametrize('name', BESIDE_THEIR_LAYER)
def test_the_constructor_reaches_exactly_the_layers_that_predict_offsets(name: str) -> None:
    make, expected = BESIDE_THEIR_LAYER[name]
    assert find_slowed_modules(nn.ModuleDict(dict(part=make()))) == {f'part.{each}' for each in expected}


@pytest.mark.parametrize('name', NO_OFFSETS)
def test_the_constructor_leaves_predictions_with_a_loss_of_their_own(name: str) -> None:
    assert find_slowed_modules(NO_OFFSETS[name]()) == set()


def test_that_of_mmengine_does_not_reach_the_layers_beside() -> None:
    for make, _ in BESIDE_THEIR_LAYER.values():
        rates = get_rates(make(), dcn_offset_lr_mult=0.1)
        reached = [name for name, (rate, _) in rates.items() if rate == 0.1]
        assert all('.conv.conv_offset.' in name for name in reached), MENDED


def test_custom_keys_go_before_the_multiplier() -> None:
    paramwise = dict(custom_keys={'conv_offset': dict(lr_mult=7.0)}, dcn_offset_lr_mult=0.1)
    rates = get_rates(FeatureAlign(4, 4), CONSTRUCTOR, **paramwise)
    assert rates['conv_offset.weight'] == (7.0, 1.0)


def test_frozen_layers_are_in_no_group() -> None:
    layer = FeatureAlign(4, 4)
    layer.conv_offset.requires_grad_(False)
    assert list(get_rates(layer, CONSTRUCTOR, dcn_offset_lr_mult=0.1)) == ['conv_adaption.weight']


@pytest.mark.parametrize(('model', 'expected'), [(nn.Conv2d(2, 2, 1), 1), (FeatureAlign(4, 4), 0)])
def test_a_multiplier_that_reaches_nothing_is_warned_of(
    model: nn.Module, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    get_rates(model, CONSTRUCTOR, dcn_offset_lr_mult=0.1)
    logger.removeHandler(caplog.handler)
    warnings = [record for record in caplog.records if 'dcn_offset_lr_mult has no effect' in record.message]
    assert [record.levelname for record in warnings] == ['WARNING'] * expected


def test_a_config_finds_the_constructor_without_any_import() -> None:
    code = f"""
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn
cfg = dict(constructor='{CONSTRUCTOR}', optimizer=dict(type='SGD', lr=1.0))
print(type(build_optim_wrapper(nn.Conv2d(1, 1, 1), cfg)).__name__)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == 'OptimWrapper'


def count_flops(model: nn.Module, *size: int) -> tuple[int, int]:
    info = get_model_complexity_info(model, size, show_table=False, show_arch=False)
    return info['flops'], info['activations']


SETTINGS = [
    dict(in_channels=4, out_channels=6, kernel_size=3, padding=1),
    dict(in_channels=6, out_channels=4, kernel_size=(3, 2), stride=(2, 1), padding=1, groups=2, deform_groups=3),
]


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
@pytest.mark.parametrize(('layer', 'kinds'), [(modules.DeformConv2dPack, 2), (modules.ModulatedDeformConv2dPack, 3)])
def test_a_layer_counts_as_two_convolutions_and_its_samples(layer: type, kinds: int, settings: dict) -> None:
    """A sample counts four multiply-adds."""
    plain = {key: value for key, value in settings.items() if key != 'deform_groups'}
    taps = 9 if settings['kernel_size'] == 3 else 6
    predicted = dict(plain, out_channels=kinds * taps * settings.get('deform_groups', 1), groups=1)
    channels = settings['in_channels']
    convolution, activations = count_flops(nn.Sequential(nn.Conv2d(**plain, bias=False)), channels, 7, 10)
    prediction, predictions = count_flops(nn.Sequential(nn.Conv2d(**predicted)), channels, 7, 10)
    positions = activations // settings['out_channels']
    sampling = 4 * channels * taps * positions
    flops = convolution + prediction + sampling
    assert count_flops(nn.Sequential(layer(**settings, bias=False)), channels, 7, 10) == (
        flops,
        activations + predictions,
    )


def test_of_a_layer_of_mmcv_only_the_prediction_of_offsets_is_counted() -> None:
    theirs = nn.Sequential(mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1))
    prediction = nn.Sequential(nn.Conv2d(4, 27, 3, padding=1))
    assert count_flops(theirs, 4, 7, 10)[0] == count_flops(prediction, 4, 7, 10)[0], MENDED


def test_a_deformable_detector_counts_as_more_than_a_plain_one() -> None:
    def flops(layer: str | None) -> int:
        model = build(fcos_config(layer=layer)).eval()
        inputs = torch.stack(images())[:1]
        return get_model_complexity_info(model, None, inputs=inputs, show_table=False, show_arch=False)['flops']

    plain, deformable, theirs = flops(None), flops('mmdcn.DCNv2'), flops('DCNv2')
    # Two layers of 16 channels on 6 x 10 positions and two of 32 on 3 x 5, each with a predictor of 27 channels.
    layers = [(16, 6 * 10), (32, 3 * 5)]
    assert deformable - plain == sum(2 * positions * 9 * channels * (27 + 4) for channels, positions in layers)
    lost = sum(2 * positions * 9 * channels * (channels - 27) for channels, positions in layers)
    assert plain - theirs == lost, MENDED


@pytest.mark.parametrize(('sampling_ratio', 'samples'), [(3, 9), (0, 1)])
def test_roi_pooling_counts_four_multiply_adds_for_each_sample(sampling_ratio: int, samples: int) -> None:
    layer = modules.DeformRoIPool((2, 3), sampling_ratio=sampling_ratio)
    inputs = (torch.randn(2, 4, 5, 7), torch.tensor([[0, 1.0, 1.0, 4.0, 3.0]] * 5))
    info = get_model_complexity_info(layer, None, inputs=inputs, show_table=False, show_arch=False)
    bins = 5 * 4 * 2 * 3
    assert (info['flops'], info['activations']) == (4 * samples * bins, bins)
