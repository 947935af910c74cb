# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d in every floating type and under autocast, on every device."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from deform_conv2d_cases import (
    CASES,
    EXACT,
    Case,
    check_against_reference,
    conv2d,
    draw_grad_output,
    expected_gradients,
    gradients,
)
from torch import Tensor

from mmdcn.ops import deform_conv2d


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('deformed', [False, True], ids=['zero offsets', 'offsets'])
def test_the_error_is_at_most_twice_that_of_a_plain_convolution(
    dtype: torch.dtype, deformed: bool, device: str
) -> None:
    """Both convolve in the same type. Each error is against float64 on the very same numbers, those of the type."""
    call = Case((64, 48), (20, 30), (3, 3), padding=(1, 1), groups=2, offset_groups=4).draw(dtype, device)
    grad_output = draw_grad_output(call)
    plain = call.zero_offsets()
    theirs = gradients(conv2d, plain, grad_output)
    exact = gradients(conv2d, plain.map(Tensor.double), grad_output.double())
    call = call if deformed else plain
    ours, ours_exact = gradients(deform_conv2d, call, grad_output), expected_gradients(call, grad_output)
    for name in ('output', 'input', 'weight', 'bias'):
        yardstick = relative_error(theirs[name], exact[name])
        assert relative_error(ours[name], ours_exact[name]) <= 2 * yardstick, name
    for name in call.tensors().keys() & {'offset', 'mask'}:  # sums of products as the others
        yardstick = relative_error(theirs['input'], exact['input'])
        assert relative_error(ours[name], ours_exact[name]) <= 2 * yardstick, name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_adds_up_in_float32(dtype: torch.dtype, device: str) -> None:
    """A sum of 4096 ones and a large number; an addition in the type would lose each of the ones."""
    input = torch.ones(1, 4097, 1, 1, dtype=dtype, device=device)
    input[0, 0] = 4096
    offset = torch.zeros(1, 2, 1, 1, dtype=dtype, device=device)
    weight = torch.ones(1, 4097, 1, 1, dtype=dtype, device=device)
    assert deform_conv2d(input, offset, weight).item() == 8192


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_images_take_float32_offsets(dtype: torch.dtype, device: str) -> None:
    """An offset of 100.25 pixels has more digits than bfloat16, and float16 has none left for its sixteenths."""
    call = CASES['everything at once'].draw(torch.float32, device)
    call = replace(
        call,
        input=F.pad(call.input, (100, 0)).to(dtype),
        weight=call.weight.to(dtype),
        bias=call.bias.to(dtype),
        offset=F.pad(call.offset, (0, 100)) + 1 / 256,
        mask=F.pad(call.mask, (0, 100)),
    )
    call.offset[:, 1::2] += 100
    check_against_reference(call)
    result = gradients(deform_conv2d, call, draw_grad_output(call))
    assert {name: result[name].dtype for name in ('output', 'input', 'weight', 'bias', 'offset', 'mask')} == {
        'output': dtype,
        'input': dtype,
        'weight': dtype,
        'bias': dtype,
        'offset': torch.float32,
        'mask': torch.float32,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason='torch finds no CUDA device')
@pytest.mark.parametrize('setting', ['neither', 'of convolutions', 'of products'])
def test_float32_takes_tf32_on_cuda_where_torch_may(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 rounds factors to 11 bits, which shows in the error; as for torch's convolutions it is the default."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', setting == 'of convolutions')
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', setting == 'of products')
    call = Case((64, 48), (20, 30), (3, 3), padding=(1, 1)).draw(torch.float32, 'cuda')
    grad_output = draw_grad_output(call)
    actual, expected = gradients(deform_conv2d, call, grad_output), expected_gradients(call, grad_output)
    for name in ('output', 'input', 'weight', 'offset', 'mask'):
        error = relative_error(actual[name], expected[name])
        assert error < 1e-5 if setting == 'neither' else 1e-5 < error < 2e-3, name


@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_images_and_weight_but_neither_offsets_nor_mask(low: torch.dtype, device: str) -> None:
    call = CASES['everything at once'].draw(torch.float32, device)
    call = replace(call, offset=call.offset + 1 / 4096, mask=call.mask + 1 / 4096)  # lost by the low types
    by_hand = replace(call, input=call.input.to(low), weight=call.weight.to(low), bias=call.bias.to(low))
    with torch.autocast(device, low):
        output = call(deform_conv2d)
    assert output.dtype == low
    torch.testing.assert_close(output, by_hand(deform_conv2d), **EXACT)


@pytest.mark.parametrize('name', ['everything at once', 'several blocks of channels'])
def test_a_backward_within_autocast_gives_the_gradients_of_one_without(
    name: str, device: str, deterministic: None
) -> None:
    call = CASES[name].draw(torch.float32, device)
    grad_output = draw_grad_output(call)
    expected = gradients(deform_conv2d, call, grad_output)
    leaves = call.map(lambda tensor: tensor.detach().requires_grad_())
    output = leaves(deform_conv2d)
    with torch.autocast(device, torch.bfloat16):
        actual = torch.autograd.grad(output, list(leaves.tensors().values()), grad_output)
    for tensor, name in zip(actual, leaves.tensors(), strict=True):
        torch.testing.assert_close(tensor, expected[name], **EXACT)


def test_autocast_brings_offsets_in_a_low_type_to_float32(device: str) -> None:
    """So a model whose offsets come from a convolution under autocast runs."""
    call = CASES['everything at once'].draw(torch.float32, device)
    low = replace(call, offset=call.offset.bfloat16(), mask=call.mask.bfloat16())
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(low(deform_conv2d), replace(call, mask=low.mask.float())(deform_conv2d), **EXACT)


def test_gradients_under_autocast_have_the_types_of_the_arguments(device: str) -> None:
    call = CASES['everything at once'].draw(torch.float32, device).map(lambda t: t.requires_grad_())
    with torch.autocast(device, torch.bfloat16):
        output = call(deform_conv2d)
    grads = torch.autograd.grad(output.float().square().sum(), list(call.tensors().values()))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_autocast_leaves_float64_alone(device: str) -> None:
    call = CASES['everything at once'].draw(torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        output = call(deform_conv2d)
    torch.testing.assert_close(output, call(deform_conv2d), **EXACT)


@pytest.mark.filterwarnings('ignore:CUDA is not available')
def test_autocast_on_another_device_changes_nothing() -> None:
    call = CASES['everything at once'].draw(torch.float32)
    with torch.autocast('cuda', torch.bfloat16):
        assert call(deform_conv2d).dtype == torch.float32
