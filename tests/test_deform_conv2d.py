# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d: values, sizes, gradients that are not needed, and determinism, on every device."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deform_conv2d_cases import (
    CASES,
    COPIED_IN_PARTS,
    EXACT,
    LAYOUTS,
    Case,
    Recorder,
    assert_close,
    assert_the_same_bits_with_any_number_of_threads,
    check_against_reference,
    conv2d,
    draw_grad_output,
    each_subset,
    expected_gradients,
    gradients,
)
from torch import Tensor

from mmdcn import reference
from mmdcn.ops import deform_conv2d

each_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


# Values


@each_case
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_and_every_gradient_equal_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    check_against_reference(case.draw(dtype, device))


@each_case
def test_zero_offsets_make_a_convolution(case: Case, device: str) -> None:
    call = case.draw(device=device).zero_offsets()
    grad_output = draw_grad_output(call)
    actual, expected = (gradients(function, call, grad_output) for function in (deform_conv2d, conv2d))
    del actual['offset'], expected['offset']
    assert_close(actual, expected, call, grad_output)


@pytest.mark.parametrize('function', ['direct', 'windows', 'taps', 'im2col', 'toeplitz'])
@each_case
def test_zero_offsets_make_each_convolution_of_the_reference(case: Case, function: str, device: str) -> None:
    if case.batch == 0:
        pytest.skip('the family from first principles begins at one image')
    call = case.draw(device=device).zero_offsets()
    convolve = getattr(reference.conv2d, f'conv2d_{function}')
    expected = convolve(call.input, call.weight, call.bias, call.stride, call.padding, call.dilation, call.groups)
    assert_close({'output': call(deform_conv2d)}, {'output': expected}, call)


@pytest.mark.parametrize('tap', range(6))
@pytest.mark.parametrize(('channel', 'step'), [(0, (1, 0)), (1, (0, 1))], ids=['y', 'x'])
def test_a_pair_of_offset_channels_moves_a_tap_down_and_right(
    tap: int, channel: int, step: tuple[int, int], device: str
) -> None:
    """The first channel moves it down, the second right."""
    case = Case((1, 1), (7, 6), (3, 2), mask=False, bias=False, batch=1)
    call = case.draw(device=device).zero_offsets()
    call.offset[:, 2 * tap + channel] = 1
    weight = torch.zeros_like(call.weight)
    weight.flatten()[tap] = 1
    shifted = F.pad(call.input, (0, 1, 0, 1))[..., step[0] :, step[1] :]
    expected = F.conv2d(shifted, weight)[..., :5, :5]
    torch.testing.assert_close(replace(call, weight=weight)(deform_conv2d), expected, **EXACT)


def test_offset_group_g_moves_the_channels_of_part_g_alone(device: str) -> None:
    call = CASES['groups across offset groups'].draw(device=device).zero_offsets()
    call.offset.unflatten(1, (3, -1))[:, 1] = 1e9  # out of the image
    call.input[:, 4:8] = 0
    assert_close({'output': call(deform_conv2d)}, {'output': call(conv2d)}, call)


@pytest.mark.mmcv_ops
@each_case
def test_mmcv_agrees(case: Case) -> None:
    from mmcv import ops

    if case.batch == 0:
        pytest.skip('mmcv refuses an empty batch')
    call = case.draw(torch.float64)
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)

    def mmcv(input: Tensor, offset: Tensor, weight: Tensor, bias: Any, mask: Any, **_: Any) -> Tensor:
        if mask is None and bias is None:
            return ops.deform_conv2d(input, offset, weight, *geometry, False, case.batch)
        ones = offset.new_ones(case.batch, offset.shape[1] // 2, *offset.shape[2:])
        zeros = weight.new_zeros(len(weight))
        return ops.modulated_deform_conv2d(
            input,
            offset,
            ones if mask is None else mask,
            weight,
            zeros if bias is None else bias,
            *geometry,
        )

    grad_output = draw_grad_output(call)
    actual, expected = (gradients(function, call, grad_output) for function in (deform_conv2d, mmcv))
    assert_close(actual, expected, call, grad_output)


@each_case
def test_torchvision_agrees(case: Case, device: str) -> None:
    ops = pytest.importorskip('torchvision.ops')
    call = case.draw(device=device)
    grad_output = draw_grad_output(call)
    actual, expected = (gradients(function, call, grad_output) for function in (deform_conv2d, ops.deform_conv2d))
    assert_close(actual, expected, call, grad_output)


# Sizes


def test_a_call_may_have_more_columns_than_32_bits_count(device: str) -> None:
    channels, padding = 2048, 170
    input = torch.randn(1, channels, 6, 7, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(1)).to(device)
    size = (6 + 2 * padding - 2, 7 + 2 * padding - 2)
    offset = torch.zeros(1, 1, 1, 1, device=device).expand(1, 18, *size)
    assert channels * 9 * size[0] * size[1] > 2**31
    output = deform_conv2d(input, offset, weight, padding=padding)
    middle = (slice(None), slice(None), slice(168, 176), slice(168, 177))
    expected = F.conv2d(input.double(), weight.double(), padding=2)
    n = 9 * channels
    torch.testing.assert_close(output[middle].double(), expected, rtol=0, atol=n * 2**-24 * expected.abs().max().item())
    assert output.count_nonzero() == output[middle].count_nonzero()


def test_the_images_of_a_batch_do_not_see_each_other(device: str) -> None:
    call = CASES['33 images'].draw(device=device)
    whole = call(deform_conv2d)
    for i in (0, 1, 31, 32):
        one = replace(call, input=call.input[i : i + 1], offset=call.offset[i : i + 1], mask=call.mask[i : i + 1])
        assert_close({'output': one(deform_conv2d)}, {'output': whole[i : i + 1]}, call)


# Work that is not done


@pytest.mark.parametrize(
    'needed',
    list(each_subset(['input', 'offset', 'mask', 'weight', 'bias'])),
    ids=lambda names: '+'.join(names) or 'none',
)
def test_only_the_gradients_that_are_needed_are_computed(needed: list[str], device: str) -> None:
    call = CASES['everything at once'].draw(device=device)
    grad_output = draw_grad_output(call)
    expected = expected_gradients(call, grad_output)
    tensors = {name: tensor.requires_grad_(name in needed) for name, tensor in call.tensors().items()}
    with Recorder() as recorder:
        output = call(deform_conv2d)
        if needed:
            grads = torch.autograd.grad(output, [tensors[name] for name in needed], grad_output)
            assert_close(dict(zip(needed, grads, strict=True)), expected, call, grad_output)
    backward = [(args, results) for name, args, results in recorder.calls if name == 'deform_conv2d_backward']
    of_operator = [name in needed for name in ('input', 'offset', 'mask', 'weight')]
    if any(of_operator):
        ((args, results),) = backward
        assert list(args[-2]) == of_operator
        assert [result.numel() > 0 for result in results] == of_operator
    else:
        assert not backward


def test_the_bias_may_change_in_place_before_the_backward(device: str) -> None:
    """As with torch's convolution, whose gradients do not depend on it either."""
    call = CASES['everything at once'].draw(device=device)
    bias = call.bias.requires_grad_()
    output = call(deform_conv2d)
    with torch.no_grad():
        bias.zero_()
    output.backward(torch.ones_like(output))
    torch.testing.assert_close(bias.grad, bias.new_full(bias.shape, output[:, 0].numel()))


# Determinism


DETERMINISM_CASES = {
    'a tile and a block': Case((3, 7), (5, 6), (3, 3), padding=(1, 1), batch=1),
    'a tile and many blocks': Case((256, 64), (7, 8), (3, 3), padding=(1, 1), batch=1),
    'many tiles and a block': Case((16, 32), (41, 43), (3, 3), padding=(1, 1)),
    'many of both': Case((96, 64), (23, 29), (3, 3), padding=(1, 1), groups=2, offset_groups=3),
    'one output channel': Case((2, 1), (210, 190), (3, 3), padding=(1, 1), batch=1),
}


@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('case', DETERMINISM_CASES.values(), ids=DETERMINISM_CASES.keys())
def test_on_the_cpu_neither_runs_nor_the_number_of_threads_change_a_bit(
    case: Case, dtype: torch.dtype, layout: str
) -> None:
    call = case.draw(dtype)
    call = replace(call, input=LAYOUTS[layout](call.input))
    grad_output = draw_grad_output(call)
    assert_the_same_bits_with_any_number_of_threads(lambda: gradients(deform_conv2d, call, grad_output))


INFERENCE_CASES = DETERMINISM_CASES | {
    'small groups': Case((12, 6), (15, 14), (3, 3), groups=3),
    'an image in parts': COPIED_IN_PARTS,
}


@pytest.mark.usefixtures('two_threads')
@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('case', INFERENCE_CASES.values(), ids=INFERENCE_CASES.keys())
def test_inference_mode_changes_no_bit(case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    """A thread's mode is its own: the threads that compute for the one that calls are not in it."""
    call = case.draw(dtype, device)
    call = replace(call, input=LAYOUTS[layout](call.input))
    expected = call(deform_conv2d)
    with torch.inference_mode():
        for same in (call, call.map(torch.clone)):  # made before and within
            output = same(deform_conv2d)
            assert output.is_inference()
            assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ('capability', 'library', 'has'),
    [
        ('default', '_C', True),
        ('avx2', '_C_avx2', torch.cpu._is_avx2_supported()),
        ('avx512', '_C_avx512', torch.cpu._is_avx512_supported()),
    ],
)
def test_each_instruction_set_agrees_with_the_reference(capability: str, library: str, has: bool) -> None:
    """ATEN_CPU_CAPABILITY turns torch down to an instruction set, and mmdcn's library with it."""
    if not has:
        pytest.skip(f'this processor has no {capability}')
    program = (
        'import torch\n'
        'torch.set_num_threads(1)\n'
        'from deform_conv2d_cases import CASES, check_against_reference\n'
        'for dtype in (torch.float64, torch.float32, torch.bfloat16):\n'
        '    for case in CASES.values():\n'
        '        check_against_reference(case.draw(dtype))\n'
        'print(*torch.ops.loaded_libraries)\n'
    )
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': capability, 'PYTHONPATH': str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f'/{library}.abi3.so' in result.stdout
