# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other projects are converted to give the same outputs; what cannot be converted is refused."""

import copy

import pytest
import torch
from checkpoints_cases import (
    CASES,
    PLACES,
    Beside,
    OffsetMask,
    Tvdcn,
    Uiiurz1,
    dcn,
    detectron2_name,
    nested,
    randomize,
    resnet,
    state_of,
)
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from mmdcn.checkpoints import SOURCES, Source, check_target, convert_state_dict

# Both sides sum at most 4 * 25 products in float64, in unlike orders.
TOLERANCE = dict(rtol=1e-10, atol=1e-10)

IMAGE = torch.randn(2, 4, 7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


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
