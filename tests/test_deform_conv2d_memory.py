# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d: strides, memory formats and the memory that it takes, on every device."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from deform_conv2d_cases import (
    CASES,
    COPIED_IN_PARTS,
    LAYOUTS,
    Call,
    Case,
    assert_close,
    check_against_reference,
    draw_grad_output,
    expanded,
    expected_gradients,
    gradients,
    sliced,
)
from torch import Tensor

from mmdcn.ops import deform_conv2d


@pytest.mark.parametrize(('channels', 'groups'), [((70, 4), 2), ((70, 70), 70)], ids=['groups', 'depthwise'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_image_too_large_to_copy_whole_gives_what_the_reference_does(
    channels: tuple[int, int], groups: int, dtype: torch.dtype, device: str
) -> None:
    """The CPU copies 9 MiB of an image at a time, and so two parts or three of the channels of this one."""
    call = replace(COPIED_IN_PARTS, channels=channels, groups=groups).draw(dtype, device)
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


def allocated_bytes(function: Callable[[], Any]) -> int:
    """Count the bytes that torch allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


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
    if device == 'cpu':  # NCHW images are copied in the forward and in the backward, and so is their gradient
        copying = allocated_bytes(lambda: forward_and_backward(call, grad_output))
        in_place = allocated_bytes(lambda: forward_and_backward(nhwc, nhwc_grad_output))
        assert copying >= in_place + 3 * 4 * call.input.numel()
