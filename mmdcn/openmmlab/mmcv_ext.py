# SPDX-License-Identifier: Apache-2.0
"""The functions of mmcv's compiled module `mmcv._ext`, implemented with mmdcn's operators and plain torch.

Names, arguments and behaviour are those of mmcv's module: functions write their results to given tensors, and add
gradients to their previous values. The distribution mmdcn-mmcv installs this module where the compiled one is missing.
Calling any other function raises an error that says how to compile mmcv.
"""

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdcn import ops
from mmdcn.openmmlab import max_pooling
from mmdcn.openmmlab.mmcv_ext_deformable import (  # noqa: F401
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    deform_roi_pool_backward,
    deform_roi_pool_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from mmdcn.ops.deform_roi_pool import _pool, _pool_backward
from mmdcn.ops.nms import METHODS
from mmdcn.version import __version__

_AVERAGE = 1  # the pool_mode for the average; 0 is the maximum

# The names of mmcv's distributions: the maintained fork's, OpenMMLab's, and OpenMMLab's without operators.
_DISTRIBUTIONS = ('onedl-mmcv', 'mmcv', 'mmcv-lite')


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmdcn has no {name}: compile mmcv's operators with `{_how_to_compile()}`, "
            "which then take precedence over mmdcn's"
        )

    missing.__name__ = name
    return missing


def _how_to_compile() -> str:
    installed = {distribution.name for distribution in metadata.distributions()}
    name = next((name for name in _DISTRIBUTIONS if name in installed), 'mmcv')
    # Without these options pip reuses the cached wheel, which has no operators.
    fresh = '--no-deps --force-reinstall --no-cache-dir'
    return f'MMCV_WITH_OPS=1 pip install --no-build-isolation {fresh} {name.removesuffix("-lite")}'


def get_compiler_version() -> str:
    """Return the text that names these operators in mmcv's environment report."""
    return f'not compiled; operators of mmdcn {__version__}'


def get_compiling_cuda_version() -> str:
    """Return what an mmcv compiled only for the CPU returns."""
    return 'not available'


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the kept boxes."""
    return ops.nms(boxes, scores, iou_threshold, offset)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,  # [N, 5]
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:  # [M]
    """Write the kept boxes and their new scores to the first rows of dets, and return their indices."""
    kept, indices = ops.soft_nms(boxes, scores, iou_threshold, sigma, min_score, METHODS[method], offset)
    dets[: len(kept)] = kept
    return indices


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group the boxes of dets [N, 5]: each group is a kept box and the boxes that it suppresses."""
    return ops.nms_match(dets[:, :4], dets[:, 4], iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool regions; in `max` mode, also write the coordinates of each maximum."""
    size, ratio = (aligned_height, aligned_width), max(sampling_ratio, 0)
    if pool_mode == _AVERAGE:
        output.copy_(_pool(input, rois, None, size, spatial_scale, ratio, 0.0, aligned))
        return
    grid = max_pooling.roi_align_samples(rois, size, spatial_scale, ratio, aligned)
    for target, values in zip((output, argmax_y, argmax_x), max_pooling.largest(input, rois, *grid), strict=True):
        target.copy_(values)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of the input."""
    if pool_mode == _AVERAGE:
        settings = (spatial_scale, max(sampling_ratio, 0), 0.0)
        deterministic = torch.are_deterministic_algorithms_enabled()
        # Only the input's shape, type and device are needed, which are those of grad_input.
        gradient, _ = _pool_backward(
            grad_output, grad_input, rois, None, *settings, (True, False), deterministic, aligned
        )
        grad_input.add_(gradient)
    else:
        max_pooling.add_gradient(grad_output, rois, argmax_y, argmax_x, grad_input)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,  # row * W + column, -1 for an empty bin
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Pool the largest pixel of each bin, and write its index."""
    rows, columns = max_pooling.roi_pool_samples(rois, (pooled_height, pooled_width), spatial_scale, input.shape[2:])
    values, y, x = max_pooling.largest(input, rois, rows, columns)
    is_empty = y < 0
    output.copy_(values.masked_fill(is_empty, 0))
    argmax.copy_((y * input.shape[3] + x).masked_fill(is_empty, -1))


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of the input."""
    # The index -1 of an empty bin becomes row -1.
    y, x = argmax.div(grad_input.shape[3], rounding_mode='floor'), argmax % grad_input.shape[3]
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    max_pooling.add_gradient(grad_output, rois, y.to(dtype), x.to(dtype), grad_input)


def sigmoid_focal_loss_forward(
    input: Tensor,  # [N, C]
    target: Tensor,  # [N]
    weight: Tensor,  # [C], or empty
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the loss of each element (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 3)."""
    is_target, p, log_p, log_q = _probabilities(input, target)
    loss = torch.where(is_target, -alpha * (1 - p) ** gamma * log_p, (alpha - 1) * p**gamma * log_q)
    output.copy_(loss * _class_weights(weight, target))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each element's loss."""
    is_target, p, log_p, log_q = _probabilities(input, target)
    q = 1 - p
    slope = torch.where(
        is_target, -alpha * q**gamma * (q - gamma * p * log_p), (alpha - 1) * p**gamma * (gamma * q * log_q - p)
    )
    grad_input.copy_(slope * _class_weights(weight, target))


def _probabilities(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return whether each element belongs to the target's class, its probability p, log(p) and log(1 - p)."""
    p = input.to(torch.promote_types(input.dtype, torch.float32)).sigmoid()
    tiny = torch.finfo(torch.float32).tiny
    is_target = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return is_target, p, p.clamp(min=tiny).log(), (1 - p).clamp(min=tiny).log()


def _class_weights(weight: Tensor, target: Tensor) -> Tensor | float:  # [N, 1]
    if weight.numel() == 0:
        return 1.0
    is_class = (target >= 0) & (target < len(weight))  # for other targets mmcv reads outside the weights
    return torch.where(is_class, weight[target.clamp(0, len(weight) - 1)], 1)[:, None]


def masked_im2col_forward(
    im: Tensor,  # [1, C, H, W]
    mask_h_idx: Tensor,  # [M]
    mask_w_idx: Tensor,  # [M]
    col: Tensor,  # [C * kernel_h * kernel_w, M]
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the columns of a convolution at some positions, with zero padding."""
    after = max(kernel_w - 1 - pad_w, 0), max(kernel_h - 1 - pad_h, 0)
    padded = F.pad(im[0], (pad_w, after[0], pad_h, after[1]))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor,  # [channels, M]
    mask_h_idx: Tensor,  # [M]
    mask_w_idx: Tensor,  # [M]
    im: Tensor,  # [1, channels, height, width]
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write the values at some positions to the image."""
    im[0][:, mask_h_idx, mask_w_idx] = col
