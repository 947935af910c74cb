# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from elsewhere: the same outputs from each, and none of them loses its offsets in silence.

The modules of the other projects are restated here from their mathematics alone, in float64, with their names.
"""

import copy
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.models.backbones import ResNet as MMDetResNet
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmdcn.checkpoints import SOURCES, Source, accept_version1_keys, check_target, convert_state_dict
from mmdcn.engine.launch import build_runner
from mmdcn.models import ResNet
from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack

# Both sides sum at most 4 * 25 products in float64, in unlike orders.
TOLERANCE = dict(rtol=1e-10, atol=1e-10)


def bilinear_weights(places: Tensor, size: int) -> Tensor:
    """Return the weight of each of `size` pixels in a bilinear sample, [..., size]; beyond them the image is zero."""
    return (1 - (places[..., None] - torch.arange(size).double()).abs()).clamp(min=0)


class Deformable(nn.Module):
    """What all of the modules share: the definition of a deformable convolution, with its places spelled out."""

    def __init__(self, kernel: int, stride: int = 1, padding: int = 1, dilation: int = 1, offset_groups: int = 1):
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.offset_groups = offset_groups

    def deform(
        self,
        x: Tensor,  # [B, C, H, W]
        offset: Tensor,  # [B, 2*G*K, H_out, W_out], (y, x) of each tap
        mask: Tensor | None,  # [B, G*K, H_out, W_out]
        weight: Tensor,  # [C_out, C/groups, k, k]
        bias: Tensor | None,
        mask_groups: int | None = None,
    ) -> Tensor:
        rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in offset.shape[2:]), indexing='ij')
        down, right = torch.meshgrid(*(torch.arange(self.kernel).double() * self.dilation,) * 2, indexing='ij')
        y, x_ = offset.unflatten(1, (self.offset_groups, -1, 2)).unbind(3)  # each [B, G, K, H_out, W_out]
        y = y + rows * self.stride - self.padding + down.reshape(-1, 1, 1)
        x_ = x_ + columns * self.stride - self.padding + right.reshape(-1, 1, 1)
        assert (y.min() < -1) and (x_.max() > x.shape[3])  # there are borders to see
        grouped = x.unflatten(1, (self.offset_groups, -1))
        samples = torch.einsum(
            'bgchw,bgkpqh,bgkpqw->bgckpq', grouped, bilinear_weights(y, x.shape[2]), bilinear_weights(x_, x.shape[3])
        )
        samples = samples.flatten(1, 2)  # [B, C, K, H_out, W_out]
        if mask is not None:
            of_groups = mask.unflatten(1, (mask_groups or self.offset_groups, -1))
            samples = samples * of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], dim=1)
        groups = x.shape[1] // weight.shape[1]
        weight = weight.flatten(2).unflatten(0, (groups, -1))
        out = torch.einsum('bgckpq,gock->bgopq', samples.unflatten(1, (groups, -1)), weight).flatten(1, 2)
        return out if bias is None else out + bias[:, None, None]

    def plain(self, outputs: int, **settings: int) -> nn.Conv2d:
        return nn.Conv2d(4, outputs, self.kernel, self.stride, self.padding, self.dilation, **settings)


class Beside(Deformable):
    """Offsets, and masks after them, from a convolution beside the layer: mmcv's version 1, detectron2, torchvision."""

    def __init__(self, offset: str = 'conv_offset', parts: int = 3, groups: int = 1, mask: str = '', **settings: int):
        super().__init__(3, **settings)
        self.names, self.parts = (offset, mask), parts
        channels = self.offset_groups * 9
        self.conv = nn.Conv2d(4, 6, 3, groups=groups, bias=bool(mask))
        self.add_module(offset, self.plain(channels * (2 if mask else parts)))
        if mask:
            self.add_module(mask, self.plain(channels))

    def forward(self, x: Tensor) -> Tensor:
        predicted = torch.cat([self.get_submodule(name)(x) for name in self.names if name], dim=1)
        offset, mask = predicted.tensor_split([self.offset_groups * 18], dim=1)
        mask = mask.sigmoid() if self.parts == 3 else None
        return self.deform(x, offset, mask, self.conv.weight, self.conv.bias)


class OffsetMask(Deformable):
    """CharlesShang's and chengdazhi's: one convolution within the layer, which does not know of the dilation."""

    def __init__(self, **settings: int):
        super().__init__(3, **settings)
        self.weight, self.bias = nn.Parameter(torch.empty(6, 4, 3, 3)), nn.Parameter(torch.empty(6))
        self.conv_offset_mask = nn.Conv2d(4, self.offset_groups * 27, 3, self.stride, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset_mask(x).chunk(3, dim=1)
        return self.deform(x, torch.cat([first, second], dim=1), mask.sigmoid(), self.weight, self.bias)


class Developer0hye(Deformable):
    def __init__(self, bias: bool, **settings: int):
        super().__init__(3, **settings)
        self.offset_conv, self.modulator_conv = self.plain(18), self.plain(9)
        self.regular_conv = self.plain(6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mask = 2 * self.modulator_conv(x).sigmoid()
        return self.deform(x, self.offset_conv(x), mask, self.regular_conv.weight, self.regular_conv.bias)


class Tvdcn(Deformable):
    def __init__(self, mask_groups: int, generator_bias: bool = False, groups: int = 1, **settings: int):
        super().__init__(3, **settings)
        self.weight, self.bias = nn.Parameter(torch.empty(6, 4 // groups, 3, 3)), nn.Parameter(torch.empty(6))
        each = dict(bias=generator_bias)
        self.offset_generator = self.plain(18 * self.offset_groups, groups=self.offset_groups, **each)
        self.mask_groups = mask_groups
        if mask_groups:
            self.mask_generator = self.plain(9 * mask_groups, groups=mask_groups, **each)

    def forward(self, x: Tensor) -> Tensor:
        mask = 2 * self.mask_generator(x).sigmoid() if self.mask_groups else None
        return self.deform(x, self.offset_generator(x), mask, self.weight, self.bias, self.mask_groups)


class Uiiurz1(nn.Module):
    """4uiiurz1's: on the padded image, to whose edge both corners of a sample and the sample itself are pulled."""

    def __init__(self, kernel: int = 3, stride: int = 1, padding: int = 1, bias: bool = False, modulation: bool = True):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.conv = nn.Conv2d(4, 6, kernel, stride=kernel, bias=bias)
        self.p_conv = nn.Conv2d(4, 2 * kernel**2, 3, padding=1, stride=stride)
        self.m_conv = nn.Conv2d(4, kernel**2, 3, padding=1, stride=stride) if modulation else None

    def forward(self, x: Tensor) -> Tensor:
        offset_y, offset_x = self.p_conv(x).chunk(2, dim=1)  # each [B, K, H_out, W_out]
        padded = nn.functional.pad(x, (self.padding,) * 4)
        taps = (torch.arange(self.kernel) - self.kernel // 2).double()
        down, right = torch.meshgrid(taps, taps, indexing='ij')
        rows, columns = (1 + self.stride * torch.arange(size).double() for size in offset_y.shape[2:])
        y = offset_y + rows[:, None] + down.reshape(-1, 1, 1)
        x_ = offset_x + columns + right.reshape(-1, 1, 1)
        bottom, end = padded.shape[2] - 1, padded.shape[3] - 1
        assert (y < -1).any() and (x_ > end + 1).any()  # there are borders to see
        batch = torch.arange(len(x)).view(-1, 1, 1, 1)
        samples = 0
        for corner_y in (y.floor().clamp(0, bottom), (y.floor() + 1).clamp(0, bottom)):
            for corner_x in (x_.floor().clamp(0, end), (x_.floor() + 1).clamp(0, end)):
                share_y = 1 - (corner_y - y.clamp(0, bottom)).abs()
                share_x = 1 - (corner_x - x_.clamp(0, end)).abs()
                pixels = padded[batch, :, corner_y.long(), corner_x.long()]  # [B, K, H_out, W_out, C]
                samples = samples + pixels * (share_y * share_x)[..., None]
        if self.m_conv is not None:
            samples = samples * self.m_conv(x).sigmoid()[..., None]
        out = torch.einsum('bkpqc,ock->bopq', samples, self.conv.weight.flatten(2))
        return out if self.conv.bias is None else out + self.conv.bias[:, None, None]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, so that many offsets are of several pixels, and the masks are of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module


def dcn(parts: int, kernel: int = 3, padding: int = 1, bias: bool = True, **settings: int) -> nn.Module:
    layer = {2: DeformConv2dPack, 3: ModulatedDeformConv2dPack}[parts]
    return layer(4, 6, kernel, padding=padding, bias=bias, **settings).double()


IMAGE = torch.randn(2, 4, 7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CASES: dict[str, list[tuple[nn.Module, nn.Module]]] = {
    'mmcv-v1': [
        (Beside(parts=2, stride=2), dcn(2, bias=False, stride=2)),
        (Beside(dilation=2, padding=2, groups=2), dcn(3, bias=False, dilation=2, padding=2, groups=2)),
    ],
    'detectron2': [(Beside(offset_groups=2), dcn(3, bias=False, deform_groups=2))],
    'charlesshang': [
        (OffsetMask(), dcn(3)),
        (OffsetMask(offset_groups=2, stride=2), dcn(3, stride=2, deform_groups=2)),
    ],
    'developer0hye': [
        (Developer0hye(bias=False, dilation=2, padding=2), dcn(3, bias=False, dilation=2, padding=2)),
        (Developer0hye(bias=True, stride=2, padding=0), dcn(3, stride=2, padding=0)),
    ],
    'tvdcn': [
        (Tvdcn(mask_groups=0, offset_groups=2), dcn(2, deform_groups=2)),
        (Tvdcn(mask_groups=1), dcn(3)),
        (Tvdcn(mask_groups=1, offset_groups=2, generator_bias=True), dcn(3, deform_groups=2)),
        (Tvdcn(mask_groups=4, offset_groups=2, groups=2), dcn(3, deform_groups=4, groups=2)),
    ],
    '4uiiurz1': [
        (Uiiurz1(), dcn(3, bias=False)),
        (Uiiurz1(modulation=False, bias=True), dcn(2)),
        (Uiiurz1(stride=2, bias=True), dcn(3, stride=2)),
        (Uiiurz1(kernel=5, stride=2), dcn(3, kernel=5, padding=2, bias=False, stride=2)),
    ],
}  # fmt: skip
CASES['mmdet-v1'] = CASES['mmcv-v1']
CASES['chengdazhi'] = CASES['charlesshang']

# Where the module lies in a checkpoint, and mmdcn's layer in the converted one.
PLACES = dict.fromkeys(CASES, ('block.', 'block.')) | {
    'mmcv-v1': ('block.', 'block.conv.'),
    'mmdet-v1': ('block.', 'block.conv.'),
    'detectron2': ('backbone.bottom_up.res3.0.', 'backbone.layer2.0.conv2.'),
}


def state_of(module: nn.Module, source: str) -> dict[str, Tensor]:
    state = {f'{PLACES[source][0]}{key}': value for key, value in module.state_dict().items()}
    return (
        {key.replace('.conv', '.conv2', 1): value for key, value in state.items()} if source == 'detectron2' else state
    )


def load_converted(layer: nn.Module, state: dict[str, Tensor], place: str, source: Source) -> dict[str, Tensor]:
    converted = convert_state_dict(state, source).state_dict
    layer.load_state_dict({key.removeprefix(place): value for key, value in converted.items()}, strict=True)
    return converted


def test_every_source_is_tested() -> None:
    assert set(SOURCES) == {'mmcv', *CASES}


@pytest.mark.parametrize(
    ('source', 'index'), [(source, index) for source in CASES for index in range(len(CASES[source]))]
)
def test_a_converted_layer_gives_the_output_of_the_original(source: str, index: int) -> None:
    module, layer = CASES[source][index]
    randomize(module)
    converted = load_converted(layer, state_of(module, source), PLACES[source][1], SOURCES[source])
    torch.testing.assert_close(layer(IMAGE), module(IMAGE), **TOLERANCE)
    check_target(converted, nested(PLACES[source][1], layer), SOURCES[source])


def nested(place: str, layer: nn.Module) -> nn.Module:
    for name in reversed(place.strip('.').split('.')):
        layer = nn.ModuleDict({name: layer})
    return layer


@pytest.mark.parametrize('names', [('offset',), ('predictor', 'modulator')], ids=['packed', 'apart'])
def test_a_torchvision_layer_is_converted_by_the_names_of_its_parts(names: tuple[str, ...]) -> None:
    module, layer = randomize(Beside(names[0], mask=names[1] if names[1:] else '')), dcn(3, bias=len(names) == 2)
    source = Source.torchvision('conv', *names)
    for root in ('', 'stage.1.'):
        state = {f'{root}{key}': value for key, value in module.state_dict().items()}
        load_converted(layer, state, f'{root}conv.', source)
        torch.testing.assert_close(layer(IMAGE), module(IMAGE), **TOLERANCE)


@pytest.mark.parametrize('place', ['', 'backbone.'])
def test_a_checkpoint_of_mmcv_version_2_stays_as_it_is(place: str) -> None:
    state = {f'{place}{key}': value for key, value in dcn(3).state_dict().items()} | {'other.weight': torch.ones(2)}
    converted, origins = convert_state_dict(state, SOURCES['mmcv'])
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) and origins[key] == (key,) for key in state)


@pytest.mark.parametrize('factor', [0.1, 1.0])
def test_dcn_offset_lr_mult_is_the_learning_rate_of_4uiiurz1s_offsets(factor: float) -> None:
    # Its backward hook is meant to multiply the gradients of the offset branch by 0.1. As published it returns nothing,
    # so that nothing changes (4uiiurz1/pytorch-deform-conv-v2, issue 7): a factor of 1. Ours can do either.
    module, layer = randomize(Uiiurz1(bias=True)), dcn(3)
    for name, parameter in module.named_parameters():
        if name.startswith(('p_conv', 'm_conv')):
            parameter.register_hook(lambda gradient: factor * gradient)
    load_converted(layer, module.state_dict(), '', SOURCES['4uiiurz1'])
    start = copy.deepcopy(layer.state_dict())
    settings = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
    theirs = build_optim_wrapper(module, settings)
    # mmengine looks for the layer below the model that it is given.
    ours = build_optim_wrapper(nn.Sequential(layer), settings | dict(paramwise_cfg=dict(dcn_offset_lr_mult=factor)))
    for _ in range(4):
        for model, optimizer in ((module, theirs), (layer, ours)):
            optimizer.update_params(model(IMAGE).square().mean())
    expected = convert_state_dict(module.state_dict(), SOURCES['4uiiurz1']).state_dict
    for key, value in layer.state_dict().items():
        assert (value - start[key]).abs().max() > 1e-5, key
        torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-8)


REFUSALS = {
    'another source': ('tvdcn', OffsetMask(), 'no layer of this source in the checkpoint: no key P.offset_generator'),
    'a kernel of 1': ('4uiiurz1', Uiiurz1(kernel=1), 'layer block: its offsets are predicted by a 3x3 .* 1x1 kernel'),
    'an even kernel': ('4uiiurz1', Uiiurz1(kernel=4), 'layer block: its offsets are predicted by a 3x3 .* 4x4 kernel'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS)
def test_what_cannot_be_converted_is_refused(case: str) -> None:
    source, module, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_of(module, source), SOURCES[source])


def test_a_wrong_number_of_offset_channels_is_refused() -> None:
    state = state_of(Uiiurz1(), '4uiiurz1') | {'block.p_conv.weight': torch.zeros(20, 4, 3, 3)}
    with pytest.raises(ValueError, match=r'layer block: p_conv has 20 channels; for a 3x3 .* a multiple of 18'):
        convert_state_dict(state, SOURCES['4uiiurz1'])


MISFITS = {
    'dilation': ('charlesshang', OffsetMask(), dict(dilation=2, padding=2), r'block has dilation \(2, 2\) '),
    'no padding': ('4uiiurz1', Uiiurz1(padding=0), dict(padding=0, bias=False), r'padding \(0, 0\) .* with \(1, 1\)'),
    'wide padding': ('4uiiurz1', Uiiurz1(padding=2), dict(padding=2, bias=False), r'padding \(2, 2\) .* with \(1, 1\)'),
    'dilated 4uiiurz1': ('4uiiurz1', Uiiurz1(), dict(dilation=2, bias=False), r'dilation \(2, 2\) in the model'),
    'no bias': ('chengdazhi', OffsetMask(), dict(bias=False), 'block.bias is not zero, and the layer in the model has'),
    'groups': ('tvdcn', Tvdcn(1, offset_groups=2), dict(), r'conv_offset.weight has shape \[54, 4, 3, 3\], .*\[27, 4'),
}  # fmt: skip


@pytest.mark.parametrize('case', MISFITS)
def test_a_model_that_would_compute_something_else_is_refused(case: str) -> None:
    source, module, settings, message = MISFITS[case]
    converted = convert_state_dict(state_of(randomize(module), source), SOURCES[source]).state_dict
    with pytest.raises(ValueError, match=message):
        check_target(converted, nested('block', dcn(3, **settings)), SOURCES[source])


def test_a_bias_of_zero_needs_no_place() -> None:
    converted = convert_state_dict(state_of(OffsetMask(), 'chengdazhi'), SOURCES['chengdazhi']).state_dict
    converted['block.bias'].data.zero_()
    check_target(converted, nested('block', dcn(3, bias=False)), SOURCES['chengdazhi'])


def test_4uiiurz1_without_padding_would_indeed_be_something_else() -> None:
    # Without the ring of zeros, an edge is not only repeated beyond the image: it counts twice.
    module, layer = randomize(Uiiurz1(padding=0)), dcn(3, bias=False)
    load_converted(layer, module.state_dict(), '', SOURCES['4uiiurz1'])
    assert (layer(IMAGE) - module(IMAGE)).abs().max() > 1


# A small ResNet, its offsets drawn at random.
SMALL = dict(depth=50, base_channels=4, stage_with_dcn=(False, True, True, True))


def resnet(kind: type[nn.Module] = ResNet, layer: str = 'mmdcn.DCNv2', **settings: object) -> nn.Module:
    return kind(**SMALL, dcn=dict(type=layer), **settings)


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


DETECTRON2 = {
    'conv1': 'stem.conv1', 'bn1': 'stem.conv1.norm', 'layer1': 'res2', 'layer2': 'res3', 'layer3': 'res4',
    'layer4': 'res5',
}  # fmt: skip
DETECTRON2_BLOCK = {
    'conv1': 'conv1', 'bn1': 'conv1.norm', 'conv2': 'conv2', 'conv2.conv_offset': 'conv2_offset', 'bn2': 'conv2.norm',
    'conv3': 'conv3', 'bn3': 'conv3.norm', 'downsample.0': 'shortcut', 'downsample.1': 'shortcut.norm',
}  # fmt: skip


def detectron2_name(key: str) -> str:
    stage, _, rest = key.partition('.')
    if not stage.startswith('layer'):
        return f'{DETECTRON2[stage]}.{rest}'
    block, _, rest = rest.partition('.')
    module, _, kind = rest.rpartition('.')
    return f'{DETECTRON2[stage]}.{block}.{DETECTRON2_BLOCK[module]}.{kind}'


@pytest.mark.parametrize(
    ('theirs', 'ours'), [('', ''), ('backbone.', 'backbone.'), ('backbone.bottom_up.', 'backbone.')]
)
def test_the_backbone_of_detectron2_is_converted_and_nothing_else(theirs: str, ours: str) -> None:
    model = randomize(resnet())
    state = {
        f'{theirs}{detectron2_name(key)}': value
        for key, value in model.state_dict().items()
        if 'num_batches_tracked' not in key
    }
    rest = dict.fromkeys(['backbone.fpn_lateral2.weight', 'roi_heads.res5.0.conv1.weight', 'pixel_mean'], torch.ones(1))
    converted, origins = convert_state_dict(state | rest, SOURCES['detectron2'])
    lost = resnet().load_state_dict({key.removeprefix(ours): value for key, value in converted.items()}, strict=False)
    assert all('num_batches_tracked' in key for key in lost.missing_keys)
    assert not lost.unexpected_keys
    assert all(torch.equal(value, model.state_dict()[key.removeprefix(ours)]) for key, value in converted.items())
    assert {key for keys in origins.values() for key in keys} == state.keys()


ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
TOOL = runpy.run_path(str(ROOT / 'tools/model_converters/convert_checkpoint.py'))


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, arguments)])
    return TOOL['run'](TOOL['main'])


def test_the_tool_converts_a_detector_and_tells_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = randomize(TOOL['build_model'](CONFIG)).float()
    state = {f'module.{key.replace(".conv_offset", "_offset")}': value for key, value in model.state_dict().items()}
    meta = dict(CLASSES=('zero', 'one'), epoch=12)
    torch.save(dict(state_dict=state | {'module.extra': torch.ones(2)}, meta=meta), tmp_path / 'old.pth')
    del state['module.backbone.conv1.weight']
    out = tmp_path / 'new/converted.pth'
    assert convert(monkeypatch, 'mmdet-v1', tmp_path / 'old.pth', out, '--config', CONFIG) == 0
    converted = torch.load(out, weights_only=True)
    assert converted['meta'] == meta
    lost = model.load_state_dict(converted['state_dict'], strict=False)
    assert lost.unexpected_keys == ['extra']
    assert not lost.missing_keys
    assert all(torch.equal(value, converted['state_dict'][key]) for key, value in model.state_dict().items())
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()]
    keys = [f'backbone.layer#.#.conv#{name}.weight' for name in ('_offset', '.conv_offset')]
    assert [*keys, '6', '[27, 64, 3, 3]'] in rows
    assert ['extra', '1'] in rows


def test_the_tool_takes_numpys_tensors_of_detectron2_into_a_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = randomize(TOOL['build_model'](CONFIG).backbone).float()
    state = {
        detectron2_name(key): value.numpy() for key, value in model.state_dict().items() if 'num_batches' not in key
    } | {'proposal_generator.rpn_head.conv.weight': np.zeros(3)}
    torch.save(dict(model=state, iteration=9), tmp_path / 'd2.pth')
    out = tmp_path / 'backbone.pth'
    assert convert(monkeypatch, 'detectron2', tmp_path / 'd2.pth', out, '--config', CONFIG) == 0
    converted = torch.load(out, weights_only=True)['state_dict']
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in converted.items())
    assert len(converted) == len(state) - 1
    printed = capsys.readouterr().out
    assert 'left out' in printed
    assert 'proposal_generator.rpn_head.conv.weight' in printed


def a_pickle(folder: Path) -> tuple[Path, str]:
    (folder / 'model.pkl').write_bytes(b'')
    return folder / 'model.pkl', 'is a pickle, which can run any code'


def more_than_weights(folder: Path) -> tuple[Path, str]:
    torch.save(dict(state_dict={}, hook=MMLogger), folder / 'more.pth')
    return folder / 'more.pth', 'contains mmengine.logging.logger.MMLogger; save only its'


def half_a_file(folder: Path) -> tuple[Path, str]:
    torch.save(dcn(3).state_dict(), folder / 'half.pth')
    (folder / 'half.pth').write_bytes((folder / 'half.pth').read_bytes()[:3000])
    return folder / 'half.pth', 'is not a file of weights, or is incomplete'


def no_weights(folder: Path) -> tuple[Path, str]:
    torch.save(dict(meta=dict()), folder / 'none.pth')
    return folder / 'none.pth', 'has no weights'


def other_shapes(folder: Path) -> tuple[Path, str]:
    state = {f'backbone.layer2.0.conv2.{key}': value for key, value in dcn(3).state_dict().items()}
    torch.save({key.replace('.conv_offset', '_offset'): value for key, value in state.items()}, folder / 'small.pth')
    return (
        folder / 'small.pth',
        'the model cannot do what the checkpoint was trained for: backbone.layer2.0.conv2.weight',
    )


def nothing_there(folder: Path) -> tuple[Path, str]:
    return folder / 'gone.pth', 'No such file'


@pytest.mark.parametrize('make', [a_pickle, more_than_weights, half_a_file, no_weights, other_shapes, nothing_there])
def test_the_tool_refuses_in_one_line_and_writes_nothing(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path, message = make(tmp_path)
    before = set(tmp_path.iterdir())
    assert convert(monkeypatch, 'mmdet-v1', path, tmp_path / 'out.pth', '--config', CONFIG) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ')
    assert message in error
    assert len(error.splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


def test_the_tool_asks_for_the_names_of_torchvisions_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(randomize(Beside('predictor')).state_dict(), tmp_path / 'old.pth')
    files = (tmp_path / 'old.pth', tmp_path / 'new.pth')
    for wrong in (('torchvision', *files), ('mmcv', *files, '--names', 'conv', 'predictor')):
        with pytest.raises(SystemExit):
            convert(monkeypatch, *wrong)
    assert convert(monkeypatch, 'torchvision', *files, '--names', 'conv', 'predictor') == 0
    assert 'conv.conv_offset.bias' in torch.load(files[1], weights_only=True)['state_dict']


class Unwritable:
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize('there', [b'an older checkpoint', None], ids=['over an older one', 'anew'])
def test_an_interrupted_write_leaves_what_was_there(there: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / 'out.pth'
    if there:
        path.write_bytes(there)
    with pytest.raises(KeyboardInterrupt):
        TOOL['save'](dict(state_dict=dict(a=torch.ones(99), b=Unwritable())), path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == ({path: there} if there else {})
