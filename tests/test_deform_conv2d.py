# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d: values, shapes, memory, types and determinism, on every device."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deform_conv2d_cases import (
    CASES,
    LAYOUTS,
    Call,
    Case,
    Recorder,
    assert_close,
    assert_the_same_bits_with_any_number_of_threads,
    draw_grad_output,
    each_subset,
    expanded,
    expected_gradients,
    gradients,
    sliced,
)
from torch import Tensor

from mmdcn import reference
from mmdcn.ops import deform_conv2d

each_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
EXACT = {'rtol': 0, 'atol': 0}


def check_against_reference(call: Call) -> None:
    grad_output = draw_grad_output(call)
    actual = gradients(deform_conv2d, call, grad_output)
    assert_close(actual, expected_gradients(call, grad_output), call, grad_output)


def conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mask: Tensor | None,
) -> Tensor:
    """Convolve and ignore the offsets, with the arguments of deform_conv2d."""
    groups = input.shape[1] // weight.shape[1]
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups) + 0 * offset.sum()


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


# Offsets and pixels that are not ordinary numbers, places where the derivative jumps


def sample(image: Tensor, y: float, x: float, dtype: torch.dtype | None = None) -> Call:
    """Sample an image [H, W] at one place, with a kernel of one pixel whose position is (0, 0)."""
    offset = image.new_zeros(1, 2, *image.shape)
    offset[0, 0, 0, 0], offset[0, 1, 0, 0] = y, x
    return Call(image[None, None], offset, image.new_ones(1, 1, 1, 1), None, (1, 1), (0, 0), (1, 1), None)


def sample_gradients(image: Tensor, y: float, x: float) -> dict[str, Any]:
    """Return the sample, its derivative by y and by x, and by the pixels."""
    call = sample(image, y, x)
    grad_output = torch.zeros_like(call.input)
    grad_output[..., 0, 0] = 1
    result = gradients(deform_conv2d, call, grad_output)
    dy, dx = result['offset'][0, :, 0, 0].tolist()
    value = result['output'][0, 0, 0, 0].item()
    return {'value': value, 'dy': dy, 'dx': dx, 'input': result['input'][0, 0]}


def squares(device: str, dtype: torch.dtype = torch.float64) -> Tensor:  # [3, 4]
    """An image that is nowhere linear, so that each cell has slopes of its own."""
    y = torch.arange(3, dtype=dtype, device=device)[:, None]
    x = torch.arange(4, dtype=dtype, device=device)
    return (y + 1) ** 2 + 10 * (x + 1) ** 2


@pytest.mark.parametrize('far', [torch.inf, -torch.inf, 1e30, -1e30, 3.0, -1.0], ids=str)
@pytest.mark.parametrize('axis', [0, 1], ids=['y', 'x'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_offset_out_of_the_image_samples_zero_and_has_no_gradient(
    far: float, axis: int, dtype: torch.dtype, device: str
) -> None:
    image = squares(device, dtype)[:, :3]
    result = sample_gradients(image, *((far, 0.5) if axis == 0 else (0.5, far)))
    assert (result['value'], result['dy'], result['dx']) == (0, 0, 0)
    assert not result['input'].any()


@pytest.mark.parametrize('other', [0.5, torch.nan, torch.inf, 1e30], ids=str)
@pytest.mark.parametrize('axis', [0, 1], ids=['y', 'x'])
def test_a_nan_offset_gives_nan_at_its_output_position_alone(axis: int, other: float, device: str) -> None:
    image = squares(device)
    call = sample(image, *((torch.nan, other) if axis == 0 else (other, torch.nan)))
    output = call(deform_conv2d)[0, 0]
    assert output[0, 0].isnan()
    torch.testing.assert_close(output.flatten()[1:], image.flatten()[1:], **EXACT)


def test_a_nan_offset_gives_no_other_sample_nan_gradients(device: str) -> None:
    """It and the weight get them: the weight's gradient is a sum over the samples."""
    call = sample(squares(device), torch.nan, 0.5)
    result = gradients(deform_conv2d, call, torch.ones_like(call.input))
    assert result['offset'][0, :, 0, 0].isnan().all()
    assert result['weight'].isnan().all()
    assert not result['offset'].flatten(2)[..., 1:].isnan().any()
    assert not result['input'].isnan().any()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf], ids=str)
def test_a_nan_or_infinite_pixel_reaches_only_samples_beside_it(bad: float, device: str) -> None:
    """Beside it are the four cells that it is a corner of."""
    image = squares(device)
    image[1, 1] = bad
    for y, x in product((-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5), (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)):
        result = sample_gradients(image, y, x)
        touched = 0 <= y < 2 and 0 <= x < 2  # the cell of (y, x) has the pixel at a corner
        assert (result['value'] == result['value'] and abs(result['value']) < 1e9) != touched, (y, x)
        assert result['input'].isfinite().all()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf], ids=str)
def test_an_image_full_of_nan_does_not_leak_into_samples_outside(bad: float, device: str) -> None:
    call = CASES['everything at once'].draw(device=device)
    call = replace(call, input=torch.full_like(call.input, bad), offset=torch.full_like(call.offset, 1e4))
    expected = torch.zeros_like(call(deform_conv2d)) + call.bias[:, None, None]
    torch.testing.assert_close(call(deform_conv2d), expected, **EXACT)


@pytest.mark.parametrize('y', [0.0, 1.0])
@pytest.mark.parametrize('x', [0.0, 1.0, 2.0])
def test_at_integer_coordinates_the_derivative_is_one_sided(y: float, x: float, device: str) -> None:
    """It is the difference to the next pixel, below or to the right."""
    image = squares(device)
    result = sample_gradients(image, y, x)
    row, column = int(y), int(x)
    assert result['value'] == image[row, column]
    assert result['dy'] == image[row + 1, column] - image[row, column]
    assert result['dx'] == image[row, column + 1] - image[row, column]


def test_at_the_last_pixel_the_derivative_is_one_sided_too(device: str) -> None:
    """It is the difference to the zero outside."""
    image = squares(device)
    result = sample_gradients(image, 2.0, 3.0)
    assert (result['value'], result['dy'], result['dx']) == (image[2, 3], -image[2, 3], -image[2, 3])


@pytest.mark.parametrize(('y', 'x'), [(-1.0, 1.0), (1.0, -1.0), (3.0, 1.0), (1.0, 4.0)])
def test_one_pixel_out_of_the_image_value_and_derivative_are_zero(y: float, x: float, device: str) -> None:
    result = sample_gradients(squares(device), y, x)
    assert (result['value'], result['dy'], result['dx']) == (0, 0, 0)


@pytest.mark.parametrize(('y', 'x'), [(-0.25, 1.5), (2.25, 1.5), (1.5, -0.25), (1.5, 3.25), (-0.25, 3.25)])
def test_within_one_pixel_of_the_image_a_sample_fades_to_zero(y: float, x: float, device: str) -> None:
    image = squares(device)
    padded = F.pad(image, (1, 1, 1, 1))
    top, left = int(y + 1), int(x + 1)  # in the padded image
    fy, fx = y + 1 - top, x + 1 - left
    v = padded[top : top + 2, left : left + 2]
    result = sample_gradients(image, y, x)
    rows, columns = torch.tensor([1 - fy, fy]).to(v), torch.tensor([1 - fx, fx]).to(v)
    assert result['value'] == pytest.approx((rows @ v @ columns).item())
    assert result['dy'] == pytest.approx(((v[1] - v[0]) @ columns).item())
    assert result['dx'] == pytest.approx(((v[:, 1] - v[:, 0]) @ rows).item())
    assert result['input'].sum().item() == pytest.approx(
        (F.pad(torch.ones_like(image), (1, 1, 1, 1))[top : top + 2, left : left + 2] * torch.outer(rows, columns))
        .sum()
        .item()
    )


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


# Memory


COPIED_IN_PARTS = Case((70, 4), (340, 310), (2, 3), (37, 41), (1, 0), groups=2, offset_groups=5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_image_too_large_to_copy_whole_gives_what_the_reference_does(dtype: torch.dtype, device: str) -> None:
    """The CPU copies 9 MiB of an image at a time, and so two parts or three of the channels of this one."""
    call = COPIED_IN_PARTS.draw(dtype, device)
    assert call.input[0].numel() * call.input.element_size() > 9 << 20
    check_against_reference(call)


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_mix_of_strides_gives_the_same_values(layout: str, device: str) -> None:
    call = Case((4, 6), (5, 4), (3, 2), (2, 1), (1, 0), (1, 2), 2, 2).draw(device=device)
    call = replace(call, input=LAYOUTS[layout](call.input), bias=sliced(call.bias))
    grad_output = draw_grad_output(call)
    for offset, mask in product(LAYOUTS.values(), repeat=2):
        mixed = replace(call, offset=offset(call.offset), mask=mask(call.mask))
        expected = expected_gradients(mixed.map(Tensor.contiguous), grad_output)
        for arrange in (layout for layout in LAYOUTS.values() if layout is not expanded):
            mixed = replace(mixed, weight=arrange(call.weight))
            assert_close(gradients(deform_conv2d, mixed, arrange(grad_output)), expected, call, grad_output)


def test_an_expanded_weight_and_an_expanded_gradient_are_like_any_other(device: str) -> None:
    call = Case((4, 6), (5, 4), (3, 2), (2, 1), (1, 0), (1, 2), 2, 2).draw(device=device)
    call = replace(call, weight=expanded(call.weight))
    grad_output = draw_grad_output(call)[:1, :1, :1, :1].expand_as(draw_grad_output(call))
    plain = call.map(Tensor.contiguous)
    expected = expected_gradients(plain, grad_output.contiguous())
    assert_close(gradients(deform_conv2d, call, grad_output), expected, call, grad_output)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ('layout', 'memory_format'),
    [
        ('contiguous', torch.contiguous_format),
        ('channels last', torch.channels_last),
        ('some channels', torch.channels_last),
        ('sliced', torch.contiguous_format),
    ],
)
def test_output_and_gradient_follow_the_memory_format_of_the_input(
    layout: str, memory_format: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    call = CASES['everything at once'].draw(dtype, device)
    call = replace(call, input=LAYOUTS[layout](call.input))
    result = gradients(deform_conv2d, call, draw_grad_output(call))
    assert result['output'].is_contiguous(memory_format=memory_format)
    assert result['input'].is_contiguous(memory_format=memory_format)


def copied_bytes(function: Callable[[], Any]) -> int:
    """Count the bytes that torch's copies write. The profiler sees the calling thread, so there is no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    torch.set_num_threads(threads)
    copies = [event for event in profile.events() if event.name == 'aten::copy_']
    return sum(4 * torch.Size(event.input_shapes[0]).numel() for event in copies)


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak of memory is read as Linux tells it')
@pytest.mark.parametrize(('groups', 'offset_groups'), [(1, 512), (512, 1), (512, 512)])
def test_the_workspace_grows_with_neither_groups_nor_offset_groups(groups: int, offset_groups: int) -> None:
    """64 positions of 512 channels: forward and backward need 40 MB at most, where all tensors have less than 10."""
    code = (
        'import re, torch\n'
        'from pathlib import Path\n'
        'from mmdcn.ops import deform_conv2d\n'
        'memory = lambda key: int(re.search(key + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])\n'
        'def train(channels, groups, offset_groups):\n'
        '    shapes = ((1, channels, 8, 8), (1, 18 * offset_groups, 8, 8), (8 * groups, channels // groups, 3, 3))\n'
        '    deform_conv2d(*(torch.ones(shape, requires_grad=True) for shape in shapes), padding=1).sum().backward()\n'
        'train(32, 1, 1)\n'
        'before = memory("VmRSS")\n'
        f'train(512, {groups}, {offset_groups})\n'
        'print(memory("VmHWM") - before)\n'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40_000


def test_channels_last_images_are_not_copied(device: str) -> None:
    call = Case((64, 32), (20, 30), (3, 3), padding=(1, 1), bias=False).draw(torch.float32, device)
    call = call.map(lambda tensor: tensor.requires_grad_())
    nhwc = replace(call, input=LAYOUTS['channels last'](call.input))
    grad_output = draw_grad_output(call)
    nhwc_grad_output = LAYOUTS['channels last'](grad_output)
    weight_bytes = 4 * call.weight.numel()

    def forward_and_backward(call: Call, grad_output: Tensor) -> None:
        torch.autograd.grad(call(deform_conv2d), list(call.tensors().values()), grad_output)

    # The weight is brought to the order of the taps, in the forward and in the backward, and its gradient back; the
    # output is put together from tiles.
    in_place = copied_bytes(lambda: forward_and_backward(nhwc, nhwc_grad_output))
    output_bytes = 4 * grad_output.numel()
    assert in_place <= 5 * weight_bytes + output_bytes
    if device == 'cpu':
        copying = copied_bytes(lambda: forward_and_backward(call, grad_output))
        assert copying > in_place + 2 * 4 * call.input.numel()


# Types


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
        'from test_deform_conv2d import CASES, check_against_reference\n'
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
