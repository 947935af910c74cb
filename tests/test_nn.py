# SPDX-License-Identifier: Apache-2.0
"""The layers that need torch alone, and the registered ones that derive from them and from mmcv's."""

import inspect
import subprocess
import sys
import types

import mmcv.ops
import pytest
import torch

import mmdcn
from mmdcn import modules, nn
from mmdcn.nn._predictors import conv2d_with_padded_channels

CONVOLUTIONS = ['DeformConv2d', 'DeformConv2dPack', 'ModulatedDeformConv2d', 'ModulatedDeformConv2dPack']
POOLINGS = ['DeformRoIPool', 'DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack']
LAYERS = [*CONVOLUTIONS, *POOLINGS]


def make(library: types.ModuleType, name: str, **settings: object) -> torch.nn.Module:
    if 'Conv' in name:
        return getattr(library, name)(4, 6, (3, 2), stride=2, groups=2, deform_groups=2, **settings)
    return getattr(library, name)((2, 3), *([4, 8] if 'Pack' in name else []), **settings)


TORCH_ALONE = """
import sys
sys.modules.update(dict.fromkeys(['mmcv', 'mmdet', 'mmengine']))  # as where they are not installed
import torch
from mmdcn import checkpoints, nn, ops
x, rois = torch.randn(2, 4, 7, 9), torch.tensor([[1.0, 1.0, 2.0, 6.0, 5.0]])
offset, mask = torch.randn(2, 18, 7, 9), torch.rand(2, 9, 7, 9)
conv, pool = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1), dict(output_size=(2, 3))
outputs = [
    nn.DeformConv2d(**conv)(x, offset),
    nn.ModulatedDeformConv2d(**conv)(x, offset, mask),
    nn.DCN(**conv)(x),
    nn.DCNv2(**conv)(x),
    nn.DeformRoIPool(**pool)(x, rois),
    nn.DeformRoIPoolPack(**pool, output_channels=4)(x, rois),
    nn.ModulatedDeformRoIPoolPack(**pool, output_channels=4)(x, rois),
]
assert [output.shape for output in outputs] == [(2, 6, 7, 9)] * 4 + [(1, 4, 2, 3)] * 3
model = torch.nn.ModuleDict(dict(conv2=nn.DCNv2(**conv)))
state = {key.replace('conv2.conv_offset', 'conv2_offset'): torch.randn_like(value)
         for key, value in model.state_dict().items()}
checkpoints.accept_version1_keys(model)
model.load_state_dict(state)
torch.testing.assert_close(model['conv2'].conv_offset.weight, state['conv2_offset.weight'])
model = torch.nn.ModuleDict(dict(conv2=nn.DCNv2(**conv)))
import warnings
with warnings.catch_warnings(record=True) as caught:
    model.load_state_dict(state, strict=False)
assert 'conv2_offset.weight' in str(caught[0].message), caught
"""


def test_the_layers_and_old_checkpoints_need_torch_alone() -> None:
    subprocess.run([sys.executable, '-c', TORCH_ALONE], check=True)


MMCV_WITHOUT_OPERATORS = """
import sys
sys.modules['mmcv._ext'] = None  # as where mmcv is installed without its compiled operators
import torch
from mmcv.cnn import build_conv_layer
try:
    import mmcv.ops
except ImportError:
    pass
else:
    raise AssertionError('mmcv.ops could be imported')
import mmdcn
layers = [build_conv_layer(dict(type=f'mmdcn.{name}'), 4, 6, 3) for name in ('DCN', 'DCNv2', 'ModulatedDCN')]
assert {layer(torch.randn(1, 4, 5, 6)).shape for layer in layers} == {(1, 6, 3, 4)}
assert isinstance(layers[1], mmdcn.nn.DCNv2)
model = mmdcn.fuse_conv_bn(torch.nn.Sequential(layers[0], torch.nn.BatchNorm2d(6)).eval())
assert type(model[1]) is torch.nn.Identity
"""


def test_where_mmcv_has_no_operators_the_layers_are_registered_too() -> None:
    subprocess.run([sys.executable, '-c', MMCV_WITHOUT_OPERATORS], check=True)


@pytest.mark.parametrize('name', LAYERS)
def test_the_arguments_are_those_of_mmcv(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (nn, mmcv.ops))
    if set(theirs) == {'args', 'kwargs'}:  # of mmcv's packed convolutions, which hand them on
        theirs = inspect.signature(getattr(mmcv.ops, name.removesuffix('Pack'))).parameters
    by_position = [value for value in ours.values() if value.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(value.name, value.default) for value in by_position] == [
        (value.name, value.default) for value in theirs.values()
    ]


@pytest.mark.parametrize('name', LAYERS)
def test_a_state_dict_passes_to_mmcv_and_back(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs, again = make(nn, name), make(mmcv.ops, name), make(nn, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_has_the_attributes_of_mmcvs(name: str) -> None:
    ours, theirs = vars(make(nn, name)), vars(make(mmcv.ops, name))
    public = {key for key in theirs if not key.startswith('_')}
    assert {key: ours[key] for key in public} == {key: theirs[key] for key in public}


@pytest.mark.parametrize('name', LAYERS)
def test_a_registered_layer_is_that_of_nn_and_an_instance_of_mmcvs_class(name: str) -> None:
    registered = getattr(modules, name)
    assert issubclass(registered, getattr(nn, name)) and issubclass(registered, getattr(mmcv.ops, name))
    own = {key for key, value in vars(registered).items() if isinstance(value, types.FunctionType)}
    assert not own
    torch.manual_seed(0)
    layer = make(modules, name)
    torch.manual_seed(0)
    torch.testing.assert_close(layer.state_dict(), make(nn, name).state_dict(), rtol=0, atol=0)


def test_the_aliases_are_those_of_the_registered_layers() -> None:
    assert nn.DCN is nn.DeformConv2dPack
    assert nn.DCNv2 is nn.ModulatedDCN is nn.ModulatedDeformConv2dPack
    assert set(nn.__all__) == set(modules.__all__)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_the_old_name_of_deform_groups_is_taken(name: str) -> None:
    with pytest.warns(DeprecationWarning, match='deform_groups'):
        layer = getattr(nn, name)(4, 6, 3, deformable_groups=2)
    assert layer.deform_groups == 2


BAD: dict[str, dict] = {
    'in_channels must be a multiple of groups = 3, got 4': dict(groups=3),
    'out_channels must be a multiple of groups = 4, got 6': dict(groups=4),
    'in_channels must be a multiple of deform_groups = 3, got 4': dict(deform_groups=3),
    'groups must be an integer, 1 or more, got 0': dict(groups=0),
    r"kernel_size must be an integer or a pair \(y, x\) of integers, got '3'": dict(kernel_size='3'),
    'stride must be at least 1, got 0': dict(stride=0),
}


@pytest.mark.parametrize('message', BAD)
def test_a_bad_argument_of_a_layer_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.DCN(**(dict(in_channels=4, out_channels=6, kernel_size=3) | BAD[message]))


def test_a_repr_tells_the_arguments_and_the_parts() -> None:
    text = repr(mmdcn.DCNv2(4, 6, 3, deform_groups=2, bias=False))
    assert 'deform_groups=2, bias=False' in text and 'conv_offset' in text


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('channels', [27, 16])
def test_padded_channels_change_neither_outputs_nor_gradients(channels: int, bias: bool) -> None:
    """On CUDA, the channels that predict offsets and masks are padded for the tensor cores."""
    plain = torch.nn.Conv2d(5, channels, (3, 2), (2, 1), (1, 0), (1, 2), bias=bias, dtype=torch.float64)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *plain.parameters()]
    geometry = (plain.stride, plain.padding, plain.dilation)
    actual, expected = conv2d_with_padded_channels(x, plain.weight, plain.bias, *geometry), plain(x)
    torch.testing.assert_close(actual, expected)
    grad_output = torch.randn_like(expected)
    gradients = (torch.autograd.grad(output, leaves, grad_output) for output in (actual, expected))
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)
