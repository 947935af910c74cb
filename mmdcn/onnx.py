# SPDX-License-Identifier: Apache-2.0
"""ONNX export: mmdcn's operators become standard ONNX operators, which need no plugin in a runtime.

    torch.onnx.export(model, arguments, path, dynamo=True, custom_translation_table=mmdcn.onnx.TRANSLATIONS)

A deformable convolution becomes `DeformConv`. Deformable RoI pooling becomes `RoIAlign`; with offsets, each bin becomes
a region of its own. This module needs `onnxscript`, as torch's exporter does. `DeformConv` exists since opset 19; an
export to an earlier opset is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import BOOL, INT64, evaluator, opset19

op: Any = opset19  # its annotations do not allow the lists and numbers that the exporter turns into constants


def _deform_conv2d(
    input: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    offset_groups: int,
    allow_tf32: bool = False,
    packed_weight: Any = None,
) -> Any:
    if offset.dtype != input.dtype:
        raise ValueError(
            f"ONNX's DeformConv takes inputs of one type, got {input.dtype} for input and {offset.dtype} for offset: "
            'export the model without autocast'
        )
    recorder: Any = evaluator.default()  # the exporter's, which uses 18 for anything earlier
    if recorder.opset.version < op.version:
        raise ValueError(
            f'ONNX has DeformConv from opset {op.version} on, got opset_version {recorder.opset.version} or earlier: '
            f'export with opset_version={op.version} or later'
        )
    return op.DeformConv(
        input, weight, offset, bias, mask,
        strides=stride, pads=[*padding, *padding], dilations=dilation, group=groups, offset_group=offset_groups,
    )  # fmt: skip


def _deform_roi_pool(
    input: Any,
    rois: Any,
    offset: Any,
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    aligned: bool = True,
) -> Any:
    images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=INT64.dtype)
    corners = op.Slice(rois, [1], [5], [1])
    if offset is None:
        return _roi_align(input, corners, images, output_size, spatial_scale, sampling_ratio, aligned)
    if not aligned:
        raise ValueError('deform_roi_pool with offsets and aligned=False has no equivalent in ONNX: use aligned=True')
    height, width = output_size
    # Pooling a bin is RoIAlign with the bin as a region, in pixels of the input.
    bins = _moved_bins(op.Mul(corners, _floats(spatial_scale)), offset, output_size, sampling_ratio, gamma)
    images_of_bins = op.Reshape(op.Expand(op.Unsqueeze(images, [1]), [1, height * width]), [-1])
    pooled = _roi_align(input, bins, images_of_bins, [1, 1], 1.0, sampling_ratio)  # [N * ph * pw, C, 1, 1]
    channels = op.Shape(input, start=1, end=2)
    by_region = op.Reshape(pooled, op.Concat(_ints(-1, height * width), channels, axis=0))
    size = op.Concat(op.Shape(rois, end=1), channels, _ints(height, width), axis=0)
    return op.Reshape(op.Transpose(by_region, perm=[0, 2, 1]), size)


def _moved_bins(corners: Any, offset: Any, output_size: list[int], sampling_ratio: int, gamma: float) -> Any:
    """Return the corners of each shifted bin, [N * ph * pw, 4]."""
    height, width = output_size
    start, end = op.Slice(corners, [0], [2], [1]), op.Slice(corners, [2], [4], [1])
    length = op.Unsqueeze(op.Sub(end, start), [1])  # [N, 1, 2], (x, y) from here on
    bin_length = op.Div(length, _floats(width, height))
    grid = _floats(*(place for y in range(height) for x in range(width) for place in (x, y)))
    index = op.Reshape(grid, [1, height * width, 2])
    moves = op.Transpose(op.Reshape(offset, [0, 2, height * width]), perm=[0, 2, 1])
    shift = op.Add(op.Mul(index, bin_length), op.Mul(moves, op.Mul(length, _floats(gamma))))
    first = op.Add(op.Unsqueeze(start, [1]), shift)
    last = op.Add(first, bin_length)
    if sampling_ratio <= 0:
        # A bin has as many samples as pixels, rounded up; rounding errors of its corners must not add a sample.
        margin = op.Mul(op.Add(op.Abs(last), _floats(1)), _floats(4 * torch.finfo(torch.float32).eps))
        first, last = op.Add(first, margin), op.Sub(last, margin)
    return op.Reshape(op.Concat(first, last, axis=2), [-1, 4])


def _roi_align(
    input: Any,
    corners: Any,
    images: Any,
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool = True,
) -> Any:
    return op.RoiAlign(
        input,
        corners,
        images,
        coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        mode='avg',
        output_height=output_size[0],
        output_width=output_size[1],
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
    )


def _floats(*values: float) -> Any:
    return op.Constant(value_floats=[float(value) for value in values])


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _nms_mask(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
    all_boxes = op.Constant(value_int=torch.iinfo(torch.int64).max)
    selected = op.NonMaxSuppression(
        boxes, op.Unsqueeze(scores, [1]), all_boxes, _floats(iou_threshold), _floats(score_threshold)
    )  # [kept, 3], (image, class, box)
    places = op.Gather(selected, [0, 2], axis=1)
    ones = op.Expand(_floats(1), op.Shape(places, start=0, end=1))
    return op.Cast(op.ScatterND(op.ConstantOfShape(op.Shape(scores)), places, ones), to=BOOL.dtype)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.mmdcn.deform_conv2d.default: _deform_conv2d,
    torch.ops.mmdcn.deform_roi_pool.default: _deform_roi_pool,
    torch.ops.mmdcn.nms_mask.default: _nms_mask,
}
