# SPDX-License-Identifier: Apache-2.0
"""mmdcn.openmmlab.mmcv_ext: each function gives what the operator's definition says, on every device."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from mmcv_ext_cases import draw_rois, generator, randn, run_roi_align
from torch import Tensor
from torch.nn import functional as F

from mmdcn.openmmlab import mmcv_ext


def each_roi_align(function: Callable) -> Callable:
    return pytest.mark.parametrize('aligned', [True, False])(pytest.mark.parametrize('ratio', [0, 2])(function))


def sample(image: Tensor, y: float, x: float) -> Tensor:
    """Sample an image [C, H, W] by RoIAlign's rule."""
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros_like(image[:, 0, 0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    above = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
    below = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
    return above * (1 - y + top) + below * (y - top)


def roi_align(input: Tensor, rois: Tensor, ratio: int, mode: int, aligned: bool) -> Tensor:
    """Define RoIAlign with 3 x 2 bins at scale 1/4, sample by sample."""
    regions = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner / 4 - 0.5 * aligned for corner in corners)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1), max(width, 1)
        bins = []
        for row in range(3):
            for column in range(2):
                down, across = ratio or max(-int(-height / 3 // 1), 0), ratio or max(-int(-width / 2 // 1), 0)
                samples = [
                    sample(
                        input[int(image)],
                        y1 + height / 3 * (row + (i + 0.5) / down),
                        x1 + width / 2 * (column + (j + 0.5) / across),
                    )
                    for i in range(down)
                    for j in range(across)
                ]
                stacked = torch.stack(samples)
                bins.append(stacked.amax(0) if mode == 0 else stacked.mean(0))
        regions.append(torch.stack(bins, 1).unflatten(1, (3, 2)))
    return torch.stack(regions)


@each_roi_align
@pytest.mark.parametrize('mode', [0, 1], ids=['max', 'avg'])
def test_roi_align_and_its_gradient_follow_from_its_samples(ratio: int, aligned: bool, mode: int, device: str) -> None:
    input, rois = randn(2, 3, 5, 9), draw_rois(7)
    actual = run_roi_align(mmcv_ext, input.to(device), rois.to(device), ratio, mode, aligned)
    input.requires_grad_()
    expected = roi_align(input, rois, ratio, mode, aligned)
    grad_input = torch.autograd.grad(expected, input, randn(*expected.shape))[0]
    torch.testing.assert_close(actual[0].cpu(), expected.detach())
    torch.testing.assert_close(actual[3].cpu(), grad_input)


def test_gradients_are_added_to_what_is_there(device: str) -> None:
    input, rois = randn(2, 3, 5, 9).to(device), draw_rois(3).to(device)
    none = input.new_zeros(0)
    settings = (3, 2, 0.25, 2, 1, True)
    grad_output = randn(3, 3, 3, 2).to(device)
    fresh, further = torch.zeros_like(input), torch.ones_like(input)
    for target in (fresh, further):
        mmcv_ext.roi_align_backward(grad_output, rois, none, none, target, *settings)
    torch.testing.assert_close(further, fresh + 1)


def bin_pixels(low: float, high: float, number: int, bins: int, size: int) -> range:
    """Return the pixels of one of RoIPool's bins along an axis at scale 1/4."""
    length, start = (high + 1 - low) / 4 / bins, low / 4
    first, end = math.floor(number * length + start), math.ceil((number + 1) * length + start)
    return range(*(min(max(edge, 0), size) for edge in (first, end)))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16], ids=str)
def test_roi_pool_gives_the_largest_pixel_of_each_bin(dtype: torch.dtype, device: str) -> None:
    """That pixel gets the gradient."""
    input = randn(2, 3, 5, 9).to(device, dtype)
    input[0, 0, 1:3] = 7  # equal pixels: the first of them counts
    rois = draw_rois(7).round().to(device, dtype)
    output = input.new_zeros(7, 3, 3, 2)
    argmax = torch.zeros_like(output, dtype=torch.int32)
    settings = dict(pooled_height=3, pooled_width=2, spatial_scale=0.25)
    mmcv_ext.roi_pool_forward(input, rois, output, argmax, **settings)
    grad_input, grad_output = torch.zeros_like(input), torch.ones_like(output)
    mmcv_ext.roi_pool_backward(grad_output, rois, argmax, grad_input, **settings)
    expected, places, gradient = torch.zeros_like(output), torch.full_like(argmax, -1), torch.zeros_like(input)
    for n, channel, row, column in product(*map(range, output.shape)):
        image, x1, y1, x2, y2 = rois[n].tolist()
        pixels = list(product(bin_pixels(y1, y2, row, 3, 5), bin_pixels(x1, x2, column, 2, 9)))
        if pixels:
            y, x = max(pixels, key=lambda at, plane=input[int(image), channel]: plane[at].item())
            expected[n, channel, row, column] = input[int(image), channel, y, x]
            places[n, channel, row, column] = y * 9 + x
            gradient[int(image), channel, y, x] += 1
    assert -1 in places
    for actual, wanted in ((output, expected), (argmax, places), (grad_input, gradient)):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('weighted', [False, True])
def test_the_focal_loss_and_its_gradient_are_cross_entropy_times_a_factor(
    dtype: torch.dtype, weighted: bool, device: str
) -> None:
    gamma, alpha = 1.5, 0.3
    input = 3 * randn(7, 4).to(device).to(dtype)
    target = torch.tensor([0, 3, 4, 1, 1, 2, 4], device=device)  # 4: none of the classes
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], device=device, dtype=dtype) if weighted else input.new_empty(0)
    exact = input.double().requires_grad_()
    truth = F.one_hot(target, 5)[:, :4].double()
    p = exact.sigmoid()
    factor = torch.where(truth == 1, alpha * (1 - p) ** gamma, (1 - alpha) * p**gamma)
    loss = factor * F.binary_cross_entropy_with_logits(exact, truth, reduction='none')
    if weighted:
        loss = loss * torch.cat([weight.double(), weight.new_ones(1).double()])[target][:, None]
    output, grad_input = torch.zeros_like(input), torch.zeros_like(input)
    mmcv_ext.sigmoid_focal_loss_forward(input, target, weight, output, gamma=gamma, alpha=alpha)
    mmcv_ext.sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma=gamma, alpha=alpha)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(output.double(), loss.detach(), rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(loss.sum(), exact)[0]
    torch.testing.assert_close(grad_input.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(('kernel', 'padding'), [((3, 2), (1, 0)), ((1, 1), (0, 0)), ((2, 5), (3, 1))])
def test_a_masked_convolution_is_a_convolution_where_the_mask_is_set(
    kernel: tuple[int, int], padding: tuple[int, int], device: str
) -> None:
    image, weight = randn(1, 3, 6, 7).to(device), randn(4, 3, *kernel).to(device)
    # What a position sees begins at it less the padding, beyond the last row and column too.
    full = F.conv2d(F.pad(image, (padding[1], kernel[1], padding[0], kernel[0])), weight)
    mask = torch.rand(6, 7, generator=generator()) > 0.6
    rows, columns = mask.nonzero().to(device).unbind(1)
    col = image.new_full((3 * kernel[0] * kernel[1], len(rows)), torch.nan)
    pads = dict(kernel_h=kernel[0], kernel_w=kernel[1], pad_h=padding[0], pad_w=padding[1])
    mmcv_ext.masked_im2col_forward(image, rows, columns, col, **pads)
    output = image.new_zeros(1, 4, 6, 7)
    mmcv_ext.masked_col2im_forward(weight.flatten(1) @ col, rows, columns, output, height=6, width=7, channels=4)
    torch.testing.assert_close(output, full[:, :, :6, :7] * mask.to(device))


def test_deformable_roi_pooling_is_that_of_mmdcn(device: str) -> None:
    from mmdcn import ops

    input, rois = randn(2, 3, 5, 9).to(device).requires_grad_(), draw_rois(4).to(device)
    offset = randn(4, 2, 3, 2).to(device).requires_grad_()
    expected = ops.deform_roi_pool(input, rois, offset, (3, 2), 0.25, 2, 0.2)
    grad_output = randn(*expected.shape).to(device)
    settings = dict(pooled_height=3, pooled_width=2, spatial_scale=0.25, sampling_ratio=2, gamma=0.2)
    output, *gradients = (torch.zeros_like(x) for x in (expected, input, offset))
    with torch.no_grad():
        mmcv_ext.deform_roi_pool_forward(input, rois, offset, output, **settings)
        mmcv_ext.deform_roi_pool_backward(grad_output, input, rois, offset, *gradients, **settings)
        mmcv_ext.deform_roi_pool_forward(input, rois, input.new_empty(0), output_without := output.clone(), **settings)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(output_without, ops.deform_roi_pool(input, rois, None, (3, 2), 0.25, 2))
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (input, offset), grad_output), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_multi_scale_attention_and_its_gradients_are_those_of_plain_torch(device: str) -> None:
    """mmcv has that version too."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    sizes = torch.tensor([[5, 4], [3, 2]], device=device)
    value = randn(2, 26, 3, 4).to(device).requires_grad_()
    places = (0.5 + 0.4 * randn(2, 7, 3, 2, 5, 2)).to(device).requires_grad_()
    weights = randn(2, 7, 3, 2, 5).to(device).requires_grad_()
    expected = multi_scale_deformable_attn_pytorch(value, sizes, places, weights)
    grad_output = randn(*expected.shape).to(device)
    first = torch.tensor([0, 20], device=device)
    gradients = [torch.zeros_like(tensor) for tensor in (value, places, weights)]
    with torch.no_grad():
        actual = mmcv_ext.ms_deform_attn_forward(value, sizes, first, places, weights, im2col_step=64)
        mmcv_ext.ms_deform_attn_backward(value, sizes, first, places, weights, grad_output, *gradients, im2col_step=64)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, (value, places, weights), grad_output)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_function_that_mmdcn_lacks_is_there_and_says_how_to_compile_it() -> None:
    assert hasattr(mmcv_ext, 'roi_align_rotated_forward')
    with pytest.raises(NotImplementedError) as error:
        mmcv_ext.roi_align_rotated_forward(1, two=2)
    message = str(error.value)
    assert 'roi_align_rotated_forward' in message and 'MMCV_WITH_OPS=1 pip install --no-build-isolation' in message
    assert not hasattr(mmcv_ext, '__path__')
