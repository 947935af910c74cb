# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_roi_pool: values, memory, types and determinism, on every device."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from deform_conv2d_cases import EXACT, LAYOUTS, Recorder, assert_the_same_bits_with_any_number_of_threads, expanded
from deform_roi_pool_cases import (
    CASES,
    LARGE,
    Call,
    Case,
    assert_close,
    between_vectors,
    draw_grad_output,
    each_dtype,
    expected_gradients,
    gradients,
)
from torch import Tensor

from mmdcn import reference
from mmdcn.ops import deform_roi_pool

each_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def check_against_reference(call: Call) -> None:
    grad_output = draw_grad_output(call)
    actual = gradients(deform_roi_pool, call, grad_output)
    assert_close(actual, expected_gradients(call, grad_output), call, grad_output)


# Values


@each_case
@each_dtype
def test_output_and_every_gradient_equal_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    check_against_reference(case.draw(dtype, device))


@pytest.mark.parametrize('name', LARGE)
def test_large_calls_equal_the_reference(name: str, device: str) -> None:
    check_against_reference(LARGE[name].draw(torch.float32, device))


@each_case
def test_the_backward_of_the_reference_is_the_derivative_of_its_forward(case: Case) -> None:
    call = case.draw()
    grad_output = draw_grad_output(call)
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    by_hand = reference.deform_roi_pool_backward(
        grad_output, call.input, call.rois, call.offset, *settings, call.aligned
    )
    expected = expected_gradients(call, grad_output)
    for name, gradient in zip(('input', 'offset'), by_hand, strict=True):
        if name in expected:
            torch.testing.assert_close(gradient, expected[name])


def mmcv_roi_align(call: Call) -> Tensor:
    from mmcv import ops

    settings = (call.spatial_scale, call.sampling_ratio, 'avg', call.aligned)
    return ops.roi_align(call.input, call.rois, call.output_size, *settings)


def torchvision_roi_align(call: Call) -> Tensor:
    ops = pytest.importorskip('torchvision.ops')
    sampling_ratio = call.sampling_ratio or -1
    return ops.roi_align(call.input, call.rois, call.output_size, call.spatial_scale, sampling_ratio, call.aligned)


def bins_of_moved_regions(call: Call, roi_align: Callable[[Call], Tensor]) -> Tensor:
    """Pool each bin by RoIAlign from a region that lies where the offset moves this bin."""
    output = call.input.new_empty(len(call.rois), call.input.shape[1], *call.output_size)
    smallest = 0 if call.aligned else 1 / call.spatial_scale
    size = (call.rois[:, 3:] - call.rois[:, 1:3]).clamp(min=smallest).repeat(1, 2)
    for row in range(call.output_size[0]):
        for column in range(call.output_size[1]):
            moves = call.gamma * size * call.offset[:, :, row, column].repeat(1, 2)
            moved = replace(call, rois=torch.cat([call.rois[:, :1], call.rois[:, 1:] + moves], 1))
            output[:, :, row, column] = roi_align(moved)[:, :, row, column]
    return output


@pytest.mark.parametrize('roi_align', [pytest.param(mmcv_roi_align, marks=pytest.mark.mmcv_ops), torchvision_roi_align])
@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.batch and case.rois])
def test_a_bin_and_its_gradient_are_those_of_roi_align_on_a_moved_region(
    name: str, roi_align: Callable[[Call], Tensor]
) -> None:
    call = CASES[name].draw()
    call = replace(call, input=call.input.requires_grad_())
    expected = roi_align(call) if call.offset is None else bins_of_moved_regions(call, roi_align)
    actual = call(deform_roi_pool)
    grad_output = draw_grad_output(call)
    torch.testing.assert_close(actual, expected)
    (ours,), (theirs,) = (torch.autograd.grad(output, call.input, grad_output) for output in (actual, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(('channel', 'step'), [(0, (0, 3)), (1, (2, 0))], ids=['x', 'y'])
def test_a_pair_of_offset_channels_moves_a_bin_right_and_down(channel: int, step: tuple[int, int], device: str) -> None:
    """The first channel moves it right, the second down: by the width, or the height, of the region, times gamma."""
    input = torch.randn(1, 1, 9, 10, generator=torch.Generator().manual_seed(0)).to(device, torch.float64)
    roi = torch.tensor([[0, 0.5, 0.5, 6.5, 4.5]], device=device, dtype=torch.float64)  # 6 x 4 pixels from (0, 0)
    offset = torch.zeros(1, 2, 4, 6, device=device, dtype=torch.float64)
    offset[:, channel] = 1
    output = deform_roi_pool(input, roi, offset, (4, 6), gamma=0.5)
    rows, columns = step
    cells = torch.nn.functional.avg_pool2d(input, 2, 1)
    torch.testing.assert_close(output[0, 0], cells[0, 0, rows : rows + 4, columns : columns + 6])


# Places and pixels that are not ordinary numbers


def test_an_empty_region_is_zero_and_an_inside_out_one_pools_backwards(device: str) -> None:
    call = replace(Case(offset=False, bins=(1, 2), sampling_ratio=2).draw(device=device), spatial_scale=1.0)
    point = torch.tensor([[0.0, 3, 3, 3, 3]]).to(call.rois)
    assert not replace(call, rois=point, sampling_ratio=0)(deform_roi_pool).any()
    forth, back = (torch.tensor([[0.0, *xs]]).to(call.rois) for xs in ((2, 1, 7, 5), (7, 5, 2, 1)))
    one, other = (replace(call, rois=rois)(deform_roi_pool) for rois in (forth, back))
    torch.testing.assert_close(one, other.flip(3))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize('corner', [1, 2, 3, 4])
def test_a_region_that_is_no_number_gives_nan_and_its_neighbours_none(bad: float, corner: int, device: str) -> None:
    call = CASES['defaults'].draw(device=device)
    expected = gradients(deform_roi_pool, call, draw_grad_output(call))
    call.rois[1, corner] = bad
    actual = gradients(deform_roi_pool, call, draw_grad_output(call))
    others = [0, 2, 3, 4]
    for name in ('output', 'offset'):
        assert actual[name][1].isnan().all()
        torch.testing.assert_close(actual[name][others], expected[name][others], **EXACT)
    assert actual['input'].isfinite().all()


@pytest.mark.parametrize('axis', [0, 1], ids=['x', 'y'])
def test_a_nan_offset_gives_nan_in_its_bin_alone_and_an_infinite_one_zero(axis: int, device: str) -> None:
    call = CASES['defaults'].draw(device=device)
    grad_output = draw_grad_output(call)
    expected = gradients(deform_roi_pool, call, grad_output)
    for bad, value in ((torch.nan, torch.nan), (torch.inf, 0.0), (-torch.inf, 0.0), (1e30, 0.0)):
        offset = call.offset.clone()
        offset[2, axis, 1, 0] = bad
        actual = gradients(deform_roi_pool, replace(call, offset=offset), grad_output)
        for name in ('output', 'offset'):
            own = torch.zeros_like(actual[name], dtype=torch.bool)
            own[2, :, 1, 0] = True
            assert torch.equal(
                actual[name][own].nan_to_num(-1), torch.full_like(actual[name][own], value).nan_to_num(-1)
            )
            torch.testing.assert_close(actual[name][~own], expected[name][~own], **EXACT)
        assert actual['input'].isfinite().all()


@pytest.mark.parametrize('size', [1e3, 1e9, 1e30])
def test_a_huge_region_costs_no_more_than_the_image(size: float, device: str) -> None:
    """It has up to 1e60 samples. The middle one of nine bins holds the image."""
    call = replace(Case(offset=False, bins=(3, 3)).draw(device=device), spatial_scale=1.0)
    call = replace(call, rois=torch.tensor([[0.0, -size, -size, size, size]]).to(call.rois))
    grad_output = draw_grad_output(call)
    result = gradients(deform_roi_pool, call, grad_output)
    if size < 1e9:
        assert_close(result, expected_gradients(call, grad_output), call, grad_output)
    # Samples are a pixel apart, or nearly; up to two of them are beyond an edge, and count as the pixel there.
    assert (result['output'][0, :, 1, 1].abs() <= 9 * call.input[0].abs().sum((1, 2)) / (2 * size / 3) ** 2).all()
    assert result['output'].count_nonzero() <= call.input.shape[1]
    assert result['input'].isfinite().all()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf], ids=str)
def test_a_nan_or_infinite_pixel_reaches_only_bins_that_sample_beside_it(bad: float, device: str) -> None:
    """Beside it are the four cells that it is a corner of."""
    input = torch.zeros(1, 1, 8, 8, device=device)
    input[0, 0, 4, 4] = bad
    roi = torch.tensor([[0, 0.75, 0.75, 8.75, 8.75]], device=device)  # samples at 0.75, 1.75, ...
    output = deform_roi_pool(input, roi, None, 8, sampling_ratio=1)[0, 0]
    expected = torch.zeros(8, 8, dtype=torch.bool, device=device)
    expected[3:5, 3:5] = True
    assert torch.equal(~output.isfinite(), expected)


@pytest.mark.parametrize('image', [-1.0, 2.0, 1e30, torch.nan])
def test_a_region_of_an_image_that_is_not_there_reads_nothing(image: float, device: str) -> None:
    call = CASES['defaults'].draw(device=device)
    call.rois[3, 0] = image
    if device == 'cpu':
        message = f'rois[3, 0] must be the number of an image of input, from 0 to 1, got {image:g}'
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call(deform_roi_pool)
    else:
        assert call(deform_roi_pool)[3].isnan().all()


# Memory


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_image_too_large_to_copy_whole_gives_what_the_reference_does(dtype: torch.dtype, device: str) -> None:
    """The CPU copies 9 MiB of an image at a time, and so two parts or three of the channels of this one."""
    call = Case(channels=70, size=(340, 310), rois=3).draw(dtype, device)
    assert 4 * call.input[0].numel() > 9 << 20
    check_against_reference(call)


@each_dtype
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_cuda_takes_no_memory_for_images(memory_format: torch.memory_format, dtype: torch.dtype, device: str) -> None:
    """Beside the results: regions and offsets in float32, and in the backward some bytes for each bin."""
    if device == 'cpu':
        pytest.skip('the CPU copies parts of images')
    call = Case(channels=64, size=(200, 336), rois=40, bins=(7, 7), reach=0.1).draw(dtype, device)
    call = replace(call, input=call.input.contiguous(memory_format=memory_format))
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    places = (call.input, call.rois, call.offset)
    grad_output = draw_grad_output(call).contiguous(memory_format=memory_format)

    def extra_bytes(function: Callable[[], Any]) -> int:
        function()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        own = sum(result.nbytes for result in ([results] if isinstance(results, Tensor) else results))
        return torch.cuda.max_memory_allocated() - before - own

    ops, bins = torch.ops.mmdcn, 40 * 49
    few = 4096 + 4 * (call.rois.numel() + call.offset.numel())
    assert extra_bytes(lambda: ops.deform_roi_pool(*places, call.output_size, *settings)) < few
    backward = partial(ops.deform_roi_pool_backward, grad_output, *places, *settings, (True, True), False)
    assert extra_bytes(backward) < 200 * bins + few


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_mix_of_strides_gives_the_same_values(layout: str, device: str) -> None:
    call = CASES['vectors of channels'].draw(device=device)
    call = replace(call, input=LAYOUTS[layout](call.input), rois=call.rois.t().contiguous().t())
    grad_output = draw_grad_output(call)
    for arrange in LAYOUTS.values():
        mixed = replace(call, offset=arrange(call.offset))
        grads = grad_output if arrange is expanded else arrange(grad_output)
        expected = expected_gradients(mixed.map(Tensor.contiguous), grad_output)
        assert_close(gradients(deform_roi_pool, mixed, grads), expected, call, grad_output)


@each_dtype
@pytest.mark.parametrize('name', ['vectors of channels', 'one bin of vectors'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('moved', [['input'], ['grad_output'], ['input', 'rois', 'offset']], ids='+'.join)
def test_tensors_may_begin_between_vectors(
    moved: list[str], memory_format: torch.memory_format, name: str, dtype: torch.dtype, device: str
) -> None:
    call = CASES[name].draw(dtype, device)
    call = replace(call, input=call.input.contiguous(memory_format=memory_format))
    tensors = {'grad_output': draw_grad_output(call).contiguous(memory_format=memory_format)}
    tensors |= {name: getattr(call, name) for name in ('input', 'rois', 'offset')}
    tensors |= {name: between_vectors(tensors[name]) for name in moved}
    grad_output = tensors.pop('grad_output')
    call = replace(call, **tensors)
    expected = expected_gradients(call, grad_output)
    assert_close(gradients(deform_roi_pool, call, grad_output), expected, call, grad_output)


@each_dtype
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_and_gradient_follow_the_memory_format_of_the_input(
    memory_format: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    call = CASES['defaults'].draw(dtype, device)
    call = replace(call, input=call.input.contiguous(memory_format=memory_format))
    result = gradients(deform_roi_pool, call, draw_grad_output(call))
    assert result['output'].is_contiguous(memory_format=memory_format)
    assert result['input'].is_contiguous(memory_format=memory_format)


# Types


@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_images_but_neither_regions_nor_offsets(low: torch.dtype, device: str) -> None:
    call = CASES['defaults'].draw(torch.float32, device)
    call = replace(call, rois=call.rois + 1 / 4096, offset=call.offset + 1 / 4096)  # lost by the low types
    call.rois[:, 0].floor_()
    with torch.autocast(device, low):
        output = call(deform_roi_pool)
    assert output.dtype == low
    torch.testing.assert_close(output, replace(call, input=call.input.to(low))(deform_roi_pool), **EXACT)


# Work that is not done, and determinism


@pytest.mark.parametrize('needed', [['input'], ['offset'], ['input', 'offset'], []], ids=lambda names: '+'.join(names))
def test_only_the_gradients_that_are_needed_are_computed(needed: list[str], device: str) -> None:
    call = CASES['defaults'].draw(device=device)
    grad_output = draw_grad_output(call)
    expected = expected_gradients(call, grad_output)
    tensors = {name: tensor.requires_grad_(name in needed) for name, tensor in call.tensors().items()}
    with Recorder() as recorder:
        output = call(deform_roi_pool)
        if needed:
            grads = torch.autograd.grad(output, [tensors[name] for name in needed], grad_output)
            assert_close(dict(zip(needed, grads, strict=True)), expected, call, grad_output)
    of_backward = [args for name, args, _ in recorder.calls if name == 'deform_roi_pool_backward']
    assert [list(args[-2]) for args in of_backward] == ([['input' in needed, 'offset' in needed]] if needed else [])


@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
@pytest.mark.parametrize('name', ['defaults', 'several blocks of channels'])
def test_on_the_cpu_neither_runs_nor_the_number_of_threads_change_a_bit(name: str, layout: str) -> None:
    call = CASES[name].draw(torch.float32)
    call = replace(call, input=LAYOUTS[layout](call.input))
    grad_output = draw_grad_output(call)
    assert_the_same_bits_with_any_number_of_threads(lambda: gradients(deform_roi_pool, call, grad_output))


@pytest.mark.parametrize('deterministic', [False, True])
def test_each_run_gives_the_same_bits(deterministic: bool, device: str) -> None:
    call = Case(channels=40, size=(6, 7), rois=50, reach=2).draw(torch.float32, device)
    grad_output = draw_grad_output(call)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = gradients(deform_roi_pool, call, grad_output)
        for _ in range(5):
            for name, again in gradients(deform_roi_pool, call, grad_output).items():
                assert torch.equal(again, first[name]), name
        assert_close(first, expected_gradients(call, grad_output), call, grad_output)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures('two_threads')
@each_case
def test_inference_mode_changes_no_bit(case: Case, device: str) -> None:
    call = case.draw(torch.float32, device)
    expected = call(deform_roi_pool)
    with torch.inference_mode():
        assert torch.equal(call.map(torch.clone)(deform_roi_pool), expected)
