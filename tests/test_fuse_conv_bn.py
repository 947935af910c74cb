# SPDX-License-Identifier: Apache-2.0
"""fuse_conv_bn: the numbers of eval mode, and never the wrong pair."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import mmcv.cnn
import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from mmdet.models import Res2Net
from mmengine.logging import MMLogger
from small_detectors import build, faster_rcnn_config, fcos_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdcn import modules
from mmdcn.models import ResNet, fuse_conv_bn

MENDED = 'mended upstream: drop the row in docs/plugin.md'
DCN = dict(type='mmdcn.DCNv2')
BN = dict(type='BN')
PYRAMID = [torch.randn(2, 8, size, size + 2, generator=torch.Generator().manual_seed(size)) for size in (12, 6, 3)]
# Each of up to 60 layers rounds its sums at 2**-24 of their size, fused or not: a few 1e-6 of the largest output.
ROUNDING = 2e-5


def randomize(model: nn.Module) -> nn.Module:
    """Draw the statistics and offsets that a trained model has, and switch to eval mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, mean=1, std=0.2)
                nn.init.normal_(module.bias, std=0.2)
        if hasattr(module, 'conv_offset'):
            nn.init.normal_(module.conv_offset.weight, std=0.05)
    model.eval()  # mmdet's ResNet returns None
    return model


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def fusion_error(fuse: Callable, model: nn.Module, *inputs: Any, run: Callable = nn.Module.__call__) -> float:
    """Return the largest error of the fused model, relative to the largest output."""

    def flat(output: Any) -> list[Tensor]:
        return [output] if isinstance(output, Tensor) else [tensor for each in output for tensor in flat(each)]

    pairs = zip(flat(run(model, *inputs)), flat(run(fuse(deepcopy(model)), *inputs)), strict=True)
    return max(((got - expected).abs().max() / expected.abs().max()).item() for expected, got in pairs)


class Block(nn.Module):
    """Two convolutions and two norms; a function says how they are used."""

    def __init__(self, use: Callable[['Block', Tensor], Tensor], conv: Callable = nn.Conv2d) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = conv(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize('layer', [nn.Conv2d, modules.DeformConv2dPack, modules.ModulatedDeformConv2dPack])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm, lambda count: nn.BatchNorm2d(count, affine=False)])
def test_a_convolution_and_its_norm_become_one(layer: type, bias: bool, norm: Callable) -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(layer(4, 6, 3, padding=1, bias=bias), norm(6), nn.ReLU()))
    assert fusion_error(fuse_conv_bn, model, torch.randn(2, 4, 5, 7)) < ROUNDING
    assert fuse_conv_bn(model) is model
    assert count_norms(model) == 0


@pytest.mark.parametrize(('layer', 'count'), [(modules.DeformConv2d, 2), (modules.ModulatedDeformConv2d, 3)])
def test_so_do_a_layer_with_offsets_from_outside_and_its_norm(layer: type, count: int) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = layer(4, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
            return self.norm(self.conv(*(x, offset, mask)[:count]))

    torch.manual_seed(0)
    head = randomize(Head())
    inputs = torch.randn(2, 4, 5, 7), torch.randn(2, 18, 5, 7), torch.rand(2, 9, 5, 7)
    assert fusion_error(fuse_conv_bn, head, *inputs) < ROUNDING
    assert count_norms(fuse_conv_bn(head)) == 0


@pytest.mark.parametrize(
    'model',
    [
        pytest.param(lambda: ResNet(18, base_channels=4, dcn=DCN, stage_with_dcn=(0, 1, 1, 1)), id='R18'),
        pytest.param(lambda: ResNet(50, base_channels=4, dcn=DCN, stage_with_dcn=(0, 0, 0, 1)), id='R50'),
        pytest.param(
            lambda: ResNet(50, base_channels=4, deep_stem=True, avg_down=True, with_cp=True), id='V1d, with_cp'
        ),
        pytest.param(lambda: Res2Net(depth=50, base_channels=4, dcn=DCN, stage_with_dcn=(0, 0, 0, 1)), id='Res2Net'),
    ],
)
def test_of_a_backbone_every_norm_is_fused(model: Callable) -> None:
    torch.manual_seed(0)
    backbone = randomize(model())
    assert fusion_error(fuse_conv_bn, backbone, torch.randn(1, 3, 45, 70)) < ROUNDING
    assert count_norms(fuse_conv_bn(backbone)) == 0


@pytest.mark.parametrize(
    ('config', 'run'),
    [(fcos_config, nn.Module.__call__), (faster_rcnn_config, lambda model, x: model.rpn_head(model.extract_feat(x)))],
)
def test_of_a_detector_every_norm_is_fused(config: Callable, run: Callable) -> None:
    model = randomize(build(config()))
    assert count_norms(model) > 10
    assert fusion_error(fuse_conv_bn, model, torch.randn(2, 3, 48, 80), run=run) < ROUNDING
    assert count_norms(fuse_conv_bn(model)) == 0


def rtmdet_head() -> nn.Module:
    """Build a head whose levels share their convolutions but not their norms."""
    return build(
        dict(
            type='RTMDetSepBNHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2, norm_cfg=BN,
            with_objectness=False, share_conv=True, bbox_coder=dict(type='DistancePointBBoxCoder'),
            anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
        )
    )  # fmt: skip


def tood_head() -> nn.Module:
    """Build a head that takes the weight and the norm out of a ConvModule, and uses them apart."""
    return build(
        dict(
            type='TOODHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2, norm_cfg=BN,
            anchor_generator=dict(
                type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32]
            ),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ('make', 'left'),
    [
        pytest.param(rtmdet_head, 0, id='RTMDet: shared convolutions'),
        pytest.param(tood_head, 2, id='TOOD: a ConvModule taken apart'),
    ],
)
def test_a_head_with_a_trap_gives_the_same_numbers(make: Callable, left: int) -> None:
    head = randomize(make())
    assert fusion_error(fuse_conv_bn, head, PYRAMID) < ROUNDING
    assert count_norms(fuse_conv_bn(head)) == left


def test_behind_a_transposed_convolution_a_norm_is_left_as_it_is() -> None:
    cfg = dict(type='CTResNetNeck', in_channels=8, num_deconv_filters=(4,), num_deconv_kernels=(4,), use_dcn=False)
    neck = randomize(build(cfg))
    assert count_norms(neck) == 2
    assert fusion_error(fuse_conv_bn, neck, PYRAMID[:1]) < ROUNDING
    assert count_norms(fuse_conv_bn(neck)) == 1


TRAPS = {
    'order of definition, not of use': (lambda b, x: b.norm1(b.conv2(b.norm2(b.conv1(x)).relu())), 0),
    'norm before convolution': (lambda b, x: b.conv2(b.norm2(b.conv1(b.norm1(x)).relu())), 2),
    'something in between': (lambda b, x: b.norm2(b.conv2(b.norm1(b.conv1(x).relu())).relu()), 2),
    'an output used twice': (lambda b, x: b.norm1(y := b.conv1(x)) + b.norm2(b.conv2(y)), 1),
    'a norm used twice': (lambda b, x: b.norm1(b.conv2(b.norm1(b.conv1(x)).relu())), 2),
    'a convolution used twice': (lambda b, x: b.norm2(b.conv1(b.norm1(b.conv1(x)).relu())), 2),
    'a weight used twice': (lambda b, x: b.norm2(b.conv2(b.norm1(b.conv1(x)))) * b.conv1.weight.sum(), 1),
    'a choice by the data': (lambda b, x: b.norm1((b.conv1 if x.sum() > 0 else b.conv2)(x)), 2),
}


@pytest.mark.parametrize('name', TRAPS)
@pytest.mark.parametrize('layer', [nn.Conv2d, modules.ModulatedDeformConv2dPack])
def test_only_a_norm_that_takes_all_of_a_convolution_is_fused(name: str, layer: type) -> None:
    torch.manual_seed(0)
    use, left = TRAPS[name]
    model = randomize(Block(use, layer))
    assert fusion_error(fuse_conv_bn, model, torch.randn(2, 4, 5, 7)) < ROUNDING
    assert count_norms(fuse_conv_bn(model)) == left


@pytest.mark.parametrize(
    ('use', 'reason'),
    [
        (TRAPS['a choice by the data'][0], 'TraceError: symbolically traced variables cannot be used'),
        (lambda b, x: b.norm1(b.conv1(x + len(x.tolist()))), 'RuntimeError: '),
        (lambda b, x: b.norm1(b.conv1(x.to(b.missing))), "AttributeError: 'Block' object has no attribute 'missing'"),
    ],
)
def test_a_module_that_cannot_be_traced_is_named_with_the_reason(
    use: Callable, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    fuse_conv_bn(nn.ModuleDict(dict(traced=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), odd=Block(use))))
    logger.removeHandler(caplog.handler)
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    assert record.message.startswith('The normalizations of odd (Block) are not fused: its forward cannot be traced: ')
    assert reason in record.message


def with_two_names(part: str) -> nn.Module:
    block = Block(lambda b, x: b.norm2(b.conv2(x)))
    setattr(block, f'{part}1', getattr(block, f'{part}2'))
    return block


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    'model',
    [
        lambda: with_two_names('conv'),
        lambda: with_two_names('norm'),
        spectral,
        *(lambda layer=layer: nn.Sequential(layer(4, 4, 3), nn.BatchNorm2d(4)) for layer in (ConvWS2d, ConvAWS2d)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
        lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('norm', 'conv', 'act')),
        lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('conv', 'act', 'norm')),
    ],
)
def test_a_pair_that_cannot_be_fused_is_left_as_it_is(model: Callable) -> None:
    torch.manual_seed(0)
    module = randomize(model())
    before = count_norms(module)
    assert fusion_error(fuse_conv_bn, module, torch.randn(2, 4, 5, 7)) < ROUNDING
    assert count_norms(fuse_conv_bn(module)) == before


@pytest.mark.parametrize(
    ('make', 'x'),
    [
        pytest.param(
            lambda: nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1), mmcv.ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            ),
            torch.randn(2, 4, 5, 7),
            id='Conv2d, DCNv2, BN',
        ),
        pytest.param(
            lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('norm', 'conv', 'act')),
            torch.randn(2, 4, 5, 7),
            id='BN, Conv2d',
        ),
        pytest.param(lambda: nn.Sequential(ConvWS2d(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 4, 5, 7), id='WS, BN'),
        pytest.param(rtmdet_head, PYRAMID, id='RTMDet'),
        pytest.param(tood_head, PYRAMID, id='TOOD'),
    ],
)
def test_mmcv_fuses_wrong_pairs(make: Callable, x: Any) -> None:
    torch.manual_seed(0)
    assert fusion_error(mmcv.cnn.fuse_conv_bn, randomize(make()), x) > 0.01, MENDED


def test_mmcv_leaves_the_norms_of_deformable_layers() -> None:
    backbone = ResNet(18, base_channels=4, dcn=dict(type='DCNv2'), stage_with_dcn=(False, True, True, True))
    assert count_norms(mmcv.cnn.fuse_conv_bn(backbone)) == 6, MENDED


@pytest.mark.parametrize('part', [0, 1])
def test_a_normalization_with_hooks_in_between_is_not_fused(part: int) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    model[part].register_forward_hook(lambda module, args, output: output * output + 1)
    x = torch.randn(2, 4, 8, 7)
    expected = model(x)
    assert torch.equal(fuse_conv_bn(model)(x), expected)
