# SPDX-License-Identifier: Apache-2.0
"""What mmcv's layers refuse or get wrong today, and that mmdcn's, with the same parameters, get it right.

A test of these fails on the day that mmcv mends its side: then the row in docs/plugin.md has to go.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import mmcv.ops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from mmdcn import modules, reference

pytestmark = pytest.mark.mmcv_ops

PACKS = {'DCN': 'DeformConv2dPack', 'DCNv2': 'ModulatedDeformConv2dPack'}
WRONG = 'wrong numbers'
NOT_FOR_BF16 = "not implemented for 'BFloat16'"
NOT_ALLOCATED = 'its data is not allocated yet'
NO_SETUP_CONTEXT = 'must override the setup_context staticmethod'


@dataclass(frozen=True)
class Defect:
    """A call, and what mmcv's layers do of it today: an error that a pattern finds, wrong numbers, or right ones."""

    call: Callable[[nn.Module, Tensor], Tensor]
    dcn: str | None
    dcnv2: str | None
    shape: tuple[int, int, int, int] = (2, 4, 6, 7)
    # Of sums of 36 products at places of up to 8 pixels, which float32 rounds by 2**-22: 16 times that.
    tolerance: float = 2**-18


def of_channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.to(memory_format=torch.channels_last))


def made_channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.to(memory_format=torch.channels_last)(x)


def of_every_second_column(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.repeat_interleave(2, dim=3)[..., ::2])


def made_bf16(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.bfloat16()(x.bfloat16())


def under_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast('cpu', torch.bfloat16):
        return layer(x)


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def compiled(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(layer, fullgraph=True, backend='eager')(x)


def exported(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(layer, (x,)).module()(x)


def mapped(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(layer)(x[None])[0]


DEFECTS = {
    'channels_last images': Defect(of_channels_last, 'input must be contiguous', WRONG),
    'a channels_last layer': Defect(made_channels_last, 'offset must be contiguous', WRONG),
    'strided images': Defect(of_every_second_column, 'input must be contiguous', WRONG),
    '33 images': Defect(plainly, 'divisible by im2col_step', None, shape=(33, 4, 6, 7)),
    'no image': Defect(plainly, 'input is too small', 'input is too small', shape=(0, 4, 6, 7)),
    'images smaller than the kernel': Defect(plainly, 'smaller than kernel', None, shape=(2, 4, 1, 1)),
    # Offsets of 1 to 4 pixels are rounded by 2**-9 to 2**-7, and so are the 36 products of which they are the sums.
    'bf16': Defect(made_bf16, NOT_FOR_BF16, NOT_FOR_BF16, tolerance=2**-5),
    'bf16 autocast': Defect(under_autocast, NOT_FOR_BF16, NOT_FOR_BF16, tolerance=2**-5),
    'torch.compile': Defect(compiled, 'Unsupported', 'Unsupported'),
    'torch.export': Defect(exported, NOT_ALLOCATED, NOT_ALLOCATED),
    'vmap': Defect(mapped, NO_SETUP_CONTEXT, NO_SETUP_CONTEXT),
}
ROWS = [(row, name) for row, defect in DEFECTS.items() for name in PACKS if getattr(defect, name.lower()) is not None]


def make_layers(layer: str) -> tuple[nn.Module, nn.Module]:
    """Return mmcv's layer and mmdcn's, with the same random parameters."""
    torch.manual_seed(0)
    theirs, ours = (getattr(package, layer)(4, 6, 3, padding=1, bias=False) for package in (mmcv.ops, modules))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def expected_output(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a pack of K = 9 taps defines: convolve for offsets and masks, then sample."""
    layer, x = deepcopy(layer).double(), x.double()
    predicted = F.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, padding=1)
    mask = predicted[:, 18:].sigmoid() if isinstance(layer, mmcv.ops.ModulatedDeformConv2d) else None
    return reference.deform_conv2d(x, predicted[:, :18], layer.weight, padding=1, mask=mask)


def is_close(output: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert output.shape == expected.shape
    return bool((output - expected).norm() <= tolerance * expected.norm())


def outcome(call: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor | str:
    try:
        return call(layer, x)
    except Exception as error:
        return f'{type(error).__name__}: {error}'


def mended(row: str) -> str:
    return f'mmcv mended this: drop the row {row!r} in docs/plugin.md'


@pytest.mark.parametrize(('row', 'name'), ROWS)
def test_mmcv_fails_where_mmdcn_gives_what_the_layer_defines(row: str, name: str) -> None:
    defect = DEFECTS[row]
    today = getattr(defect, name.lower())
    theirs, ours = make_layers(PACKS[name])
    x = torch.randn(defect.shape)
    expected = expected_output(theirs, x)

    result = outcome(defect.call, theirs, x)
    if today is WRONG:
        assert isinstance(result, Tensor), result
        assert not is_close(result, expected, 0.5), mended(row)
    else:
        assert isinstance(result, str), mended(row)
        assert re.search(today, result)
    assert is_close(defect.call(ours, x), expected, defect.tolerance)


def test_mmcv_has_no_bias_in_dcn_where_mmdcn_adds_one() -> None:
    with pytest.raises(AssertionError, match='bias=True is not supported'):  # pytest says DID NOT RAISE if mended
        mmcv.ops.DeformConv2dPack(4, 6, 3, bias=True)
    layer, x = modules.DeformConv2dPack(4, 6, 3, padding=1, bias=True), torch.randn(2, 4, 6, 7)
    nn.init.normal_(layer.bias)
    expected = expected_output(layer, x) + layer.bias.double()[:, None, None]
    assert is_close(layer(x), expected, 2**-18)


@pytest.mark.parametrize('name', PACKS)
def test_mmcv_has_no_meta_tensors_where_mmdcn_gives_their_shape(name: str) -> None:
    theirs, ours = (layer.to('meta') for layer in make_layers(PACKS[name]))
    x = torch.empty(2, 4, 6, 7, device='meta')
    assert isinstance(outcome(plainly, theirs, x), str), mended('meta tensors')
    assert ours(x).shape == (2, 6, 6, 7)


@pytest.mark.parametrize('name', PACKS)
def test_mmcvs_second_derivatives_are_wrong_and_mmdcns_are_right(name: str) -> None:
    """Right ones equal finite differences."""
    theirs, ours = (layer.double() for layer in make_layers(PACKS[name]))
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert not gradgradcheck(theirs, x, raise_exception=False), mended('second derivatives')
    assert gradgradcheck(ours, x)


@pytest.mark.parametrize('name', PACKS)
def test_mmcv_hides_nan_offsets_where_mmdcn_shows_them(name: str) -> None:
    theirs, ours = make_layers(PACKS[name])
    x = torch.randn(2, 4, 6, 7)
    for layer in (theirs, ours):
        with torch.no_grad():
            layer.conv_offset.bias[:18] = torch.nan
    assert theirs(x).isfinite().all(), mended('NaN offsets')
    assert ours(x).isnan().all()


@pytest.mark.parametrize(('shape', 'what'), [((2, 36, 6, 7), 'channels'), ((2, 18, 7, 8), 'positions')])
def test_mmcv_takes_offsets_of_a_wrong_shape_where_mmdcn_refuses_them(shape: tuple, what: str) -> None:
    # Too many numbers, for what mmcv does of too few reads outside of the tensor.
    theirs, ours = make_layers('ModulatedDeformConv2d')
    x, offset, mask = torch.randn(2, 4, 6, 7), torch.randn(shape), torch.rand(2, shape[1] // 2, *shape[2:])
    assert theirs(x, offset, mask).shape == (2, 6, 6, 7), mended(f'offsets for other {what}')
    with pytest.raises(ValueError, match='offset must have'):
        ours(x, offset, mask)


def test_mmcv_refuses_offsets_that_are_a_slice_where_mmdcn_takes_them() -> None:
    theirs, ours = make_layers('DeformConv2d')
    x, predicted = torch.randn(2, 4, 6, 7), torch.randn(2, 27, 6, 7)
    result = outcome(lambda layer, x: layer(x, predicted[:, :18]), theirs, x)
    assert isinstance(result, str), mended('sliced offsets')
    assert 'offset must be contiguous' in result
    torch.testing.assert_close(ours(x, predicted[:, :18]), theirs(x, predicted[:, :18].contiguous()))
