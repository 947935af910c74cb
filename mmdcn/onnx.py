# SPDX-License-Identifier: Apache-2.0
"""ONNX: a deformable convolution becomes the standard's `DeformConv`, which needs no plugin of a runtime.

    torch.onnx.export(model, arguments, path, dynamo=True, custom_translation_table=mmdcn.onnx.TRANSLATIONS)

This module needs `onnxscript`, as torch's exporter does. `DeformConv` is of opset 19; an export to an earlier one is
refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import evaluator
from onnxscript import opset19 as op


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
) -> Any:
    if offset.dtype != input.dtype:
        raise ValueError(
            f"ONNX's DeformConv has one type, got {input.dtype} for input and {offset.dtype} for offset: "
            'export the model without autocast'
        )
    recorder: Any = evaluator.default()  # the exporter's, which takes 18 for anything earlier
    if recorder.opset.version < op.version:
        raise ValueError(
            f'ONNX has DeformConv from opset {op.version} on, got opset_version {recorder.opset.version} or earlier: '
            f'export with opset_version={op.version} or later'
        )
    return op.DeformConv(
        input, weight, offset, bias, mask,
        strides=stride, pads=[*padding, *padding], dilations=dilation, group=groups, offset_group=offset_groups,
    )  # fmt: skip


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.mmdcn.deform_conv2d.default: _deform_conv2d}
