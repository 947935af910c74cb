# SPDX-License-Identifier: Apache-2.0
"""mmdcn.openmmlab.mmcv_ext gives what mmcv's compiled functions give, and takes the same arguments."""

import re
from typing import Any

import pytest
import torch
from mmcv_ext_cases import draw_rois, generator, randn, run_roi_align
from torch import Tensor
from torch.nn import functional as F

from mmdcn.openmmlab import mmcv_ext

mmcv_ops = pytest.mark.mmcv_ops


def import_compiled() -> Any:
    """Return mmcv's own module, which must be compiled."""
    import mmcv._ext

    assert mmcv._ext is not mmcv_ext, 'mmcv is not compiled'
    return mmcv._ext


def draw_boxes(count: int, levels: int) -> tuple[Tensor, Tensor]:
    """Boxes that overlap, at whole quarters of a pixel; so few levels of scores that many are equal."""
    g = generator(count)
    first, size = (torch.randint(low, 160, (count, 2), generator=g) / 4 for low in (0, 1))
    scores = torch.randint(0, levels, (count,), generator=g) / levels
    return torch.cat([first, first + size], 1), scores


@mmcv_ops
@pytest.mark.parametrize('count', [0, 1, 2, 17, 400])
@pytest.mark.parametrize('levels', [3, 1000])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.75])
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_and_its_order_are_those_of_mmcv(count: int, levels: int, threshold: float, offset: int) -> None:
    boxes, scores = draw_boxes(count, levels)
    keep = [
        module.nms(boxes, scores, iou_threshold=threshold, offset=offset) for module in (mmcv_ext, import_compiled())
    ]
    assert torch.equal(*keep)


@mmcv_ops
@pytest.mark.parametrize('count', [0, 1, 17, 300])
@pytest.mark.parametrize('levels', [3, 1000])
@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_its_scores_and_its_order_are_those_of_mmcv(count: int, levels: int, method: int, offset: int) -> None:
    boxes, scores = draw_boxes(count, levels)
    results = []
    for module in (mmcv_ext, import_compiled()):
        dets = boxes.new_zeros(count, 5)
        settings = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)
        indices = module.softnms(boxes.clone(), scores.clone(), dets, **settings)
        results.append((indices, dets[: len(indices)]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)


@mmcv_ops
@pytest.mark.parametrize('count', [1, 17, 300])
@pytest.mark.parametrize('levels', [3, 1000])
@pytest.mark.parametrize('threshold', [0.1, 0.5])
def test_the_groups_of_nms_match_are_those_of_mmcv(count: int, levels: int, threshold: float) -> None:
    boxes, scores = draw_boxes(count, levels)
    dets = torch.cat([boxes, scores[:, None]], 1)
    ours, theirs = (module.nms_match(dets, iou_threshold=threshold) for module in (mmcv_ext, import_compiled()))
    assert ours == theirs


@mmcv_ops
@pytest.mark.parametrize('count', [0, 1, 7])
@pytest.mark.parametrize('ratio', [0, 1, 3])
@pytest.mark.parametrize('mode', [0, 1], ids=['max', 'avg'])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_roi_align_and_its_gradient_are_those_of_mmcv(
    count: int, ratio: int, mode: int, aligned: bool, dtype: torch.dtype
) -> None:
    input, rois = randn(2, 3, 5, 9, dtype=dtype), draw_rois(count, dtype)
    ours, theirs = (
        run_roi_align(module, input, rois, ratio, mode, aligned) for module in (mmcv_ext, import_compiled())
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, actual, expected in zip(('output', 'argmax_y', 'argmax_x', 'grad_input'), ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda m, name=name: f'{name}: {m}')


MAP_CHANNELS = dict(offset=36, mask=18)


def draw_convolution() -> dict[str, Tensor]:
    return dict(
        input=randn(2, 6, 9, 8), weight=randn(4, 3, 3, 2), offset=randn(2, 36, 5, 10), mask=randn(2, 18, 5, 10),
        bias=randn(4), grad=randn(2, 4, 5, 10),
    )  # fmt: skip


def run_deform_conv(module: Any, t: dict[str, Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of input, offset and weight."""
    output, none = torch.empty_like(t['grad']), t['input'].new_empty(0)
    names = dict(kW=2, kH=3, dW=1, dH=2, padW=2, padH=1, dilationW=2, dilationH=1, group=2, deformable_group=3)
    step = dict(im2col_step=2)
    module.deform_conv_forward(t['input'], t['weight'], t['offset'], output, none, none.clone(), **names, **step)
    grads = [torch.zeros_like(t[name]) for name in ('input', 'offset', 'weight')]
    images = (t['input'], t['offset'], t['grad'])
    module.deform_conv_backward_input(*images, *grads[:2], t['weight'], none.clone(), **names, **step)
    buffers = (none.clone(), none.clone())
    module.deform_conv_backward_parameters(*images, grads[2], *buffers, **names, scale=1, **step)
    return [output, *grads]


def run_modulated_deform_conv(module: Any, t: dict[str, Tensor], with_bias: bool) -> list[Tensor]:
    """Return the output, and the gradients of input, weight, bias, offset and mask."""
    output, none = torch.empty_like(t['grad']), t['input'].new_empty(0)
    bias = t['bias'] if with_bias else none
    names = dict(
        kernel_h=3, kernel_w=2, stride_h=2, stride_w=1, pad_h=1, pad_w=2, dilation_h=1, dilation_w=2, group=2,
        deformable_group=3, with_bias=with_bias,
    )  # fmt: skip
    buffers = [none.clone(), none.clone()]
    maps = (t['offset'], t['mask'])
    module.modulated_deform_conv_forward(t['input'], t['weight'], bias, buffers[0], *maps, output, buffers[1], **names)
    grads = [torch.zeros_like(x) for x in (t['input'], t['weight'], bias, *maps)]
    module.modulated_deform_conv_backward(
        t['input'], t['weight'], bias, buffers[0], *maps, buffers[1], *grads, t['grad'], **names
    )
    return [output, *grads]


@mmcv_ops
def test_deform_conv_and_its_gradients_are_those_of_mmcv() -> None:
    tensors = draw_convolution()
    for ours, theirs in zip(
        *(run_deform_conv(module, tensors) for module in (mmcv_ext, import_compiled())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@mmcv_ops
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('finer', [False, True], ids=['maps of the size of the output', 'finer maps'])
def test_modulated_deform_conv_and_its_gradients_are_those_of_mmcv(with_bias: bool, finer: bool) -> None:
    tensors = draw_convolution()
    if finer:
        tensors |= dict(offset=randn(2, 36, 7, 11), mask=randn(2, 18, 7, 11))
    results = (run_modulated_deform_conv(module, tensors, with_bias) for module in (mmcv_ext, import_compiled()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_first_values_of_finer_maps_are_used_in_any_memory_format(memory_format: torch.memory_format) -> None:
    finer = draw_convolution() | dict(offset=randn(2, 36, 7, 11), mask=randn(2, 18, 7, 11))
    first = finer | {name: finer[name].flatten(1)[:, : c * 50].view(2, c, 5, 10) for name, c in MAP_CHANNELS.items()}
    expected = run_modulated_deform_conv(mmcv_ext, first, with_bias=True)
    expected[4:] = [F.pad(gradient.flatten(1), (0, 27 * gradient.shape[1])) for gradient in expected[4:]]
    arranged = {name: finer[name].contiguous(memory_format=memory_format) for name in MAP_CHANNELS}
    results = run_modulated_deform_conv(mmcv_ext, finer | arranged, with_bias=True)
    results[4:] = [gradient.flatten(1) for gradient in results[4:]]
    for actual, same in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, same)


@mmcv_ops
def test_it_has_every_name_that_mmcv_asks_for_and_takes_the_same_arguments() -> None:
    for name, function in vars(import_compiled()).items():
        if not name.startswith('_') and name in vars(mmcv_ext):
            names = re.findall(r'(\w+): ', function.__doc__.split(' ->')[0])
            code = getattr(mmcv_ext, name).__code__
            assert list(code.co_varnames[: code.co_argcount]) == names, name
