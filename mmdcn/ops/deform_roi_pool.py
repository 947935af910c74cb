# SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling: the function, and the registration of its operator with torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdcn import reference
from mmdcn.ops._arguments import (
    Pair,
    check,
    check_floating,
    check_like,
    check_output_mask,
    check_shape,
    count,
    overridable,
    pair,
    single_if_low,
)
from mmdcn.ops._autocast import autocast
from mmdcn.ops._fake import empty_gradient, memory_format
from mmdcn.ops._transforms import into_batch, pull_back, register, unfold

_OP = 'mmdcn::deform_roi_pool'
_BACKWARD_OP = 'mmdcn::deform_roi_pool_backward'


@overridable
def deform_roi_pool(
    input: Tensor,  # [B, C, H, W]
    rois: Tensor,  # [N, 5]
    offset: Tensor | None,  # [N, 2, ph, pw]
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:  # [N, C, ph, pw]
    """Pool regions of interest into bins, each shifted by its own offset.

    This is deformable RoI pooling (Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.2) on the grid
    of RoIAlign (He et al., Mask R-CNN, ICCV 2017, section 3), as in mmcv. Without offsets it is RoIAlign. A bin is the
    mean of bilinear samples. A sample more than one pixel outside the image is zero; the coordinates of a nearer one
    are clamped to the image.

    Args:
        input: Images, in float64, float32, float16 or bfloat16, with any strides. The output has their memory format.
        rois: The regions, (image, x1, y1, x2, y2): the index of the image, and two corners in pixels of the image,
            which `spatial_scale` maps to `input`. They have the type of the input; with float16 or bfloat16 input, they
            may be float32. They get no gradient. A region with a NaN or an infinite corner gives NaN.
        offset: Shift of each bin, (x, y) in units of gamma times the region's size. The types are those of `rois`.
            With None, no bin is shifted. An infinite offset pools zero, a NaN gives NaN.
        output_size: Number of bins, at least 1; one integer or (ph, pw).
        spatial_scale: Pixels of `input` per pixel of the image.
        sampling_ratio: Samples per bin along each axis. With 0, a bin has as many samples as pixels, rounded up.
        gamma: Scale of the offsets.
        aligned: Whether the centre of the first pixel is at 0.5, as in today's RoIAlign. If not, it is at 0, and a
            region is at least one pixel of `input` wide and high, as in the first version of RoIAlign.

    Returns:
        The bins, in the type of the input. Under autocast they have autocast's type, while regions and offsets are in
        float32.

    Raises:
        ValueError: If the rank, shape, type or device of an argument does not fit, or an integer is too small, or is
            2^31 or more.
        RuntimeError: If a region refers to an image that does not exist. On CUDA such a region gives NaN instead,
            because a check would wait for the device.
    """
    (input,), (rois, offset) = autocast((input,), (rois, offset))
    size, ratio = pair(output_size, 'output_size', 1), count(sampling_ratio, 'sampling_ratio')
    if torch.compiler.is_compiling():
        _check(input, rois, offset, size)
    try:
        return _pool(input, rois, offset, size, float(spatial_scale), ratio, float(gamma), aligned)
    except Exception:
        _check(input, rois, offset, size)  # rejects what the operator rejects, and says why
        raise


def _check(input: Tensor, rois: Tensor, offset: Tensor | None, size: Pair) -> None:
    check_floating(input, 'input', 4, '[B, C, H, W]')
    check_floating(rois, 'rois', 2, '[N, 5]')
    check(
        input.shape[1] * input.shape[2] * input.shape[3] > 0,
        lambda: f'input must have channels and pixels, got shape {list(input.shape)}',
    )
    check_shape(rois, 'rois', '[N, 5], (image, x1, y1, x2, y2)', rois.shape[0], 5)
    check_like(rois, 'rois', input, input.dtype, *single_if_low(input))
    if offset is not None:
        check_floating(offset, 'offset', 4, '[N, 2, ph, pw]')
        check_shape(offset, 'offset', '[N, 2, ph, pw]', rois.shape[0], 2, *size)
        check_like(offset, 'offset', input, input.dtype, *single_if_low(input))


def _reference(input: Tensor, rois: Tensor, offset: Tensor | None, output_size: Pair, *settings: Any) -> Tensor:
    _check(input, rois, offset, output_size)
    return reference.deform_roi_pool(input, rois, offset, output_size, *settings)


def _reference_backward(*arguments: Any) -> tuple[Tensor, ...]:
    output_mask, _deterministic, aligned = arguments[7:]
    gradients: Any = reference.deform_roi_pool_backward(*(*arguments[:7], aligned))
    placeholder = arguments[0].new_empty(0)
    return tuple(grad if needed else placeholder for grad, needed in zip(gradients, output_mask, strict=True))


@torch.library.register_fake(_OP)
def _fake(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    aligned: bool = True,
) -> Tensor:
    size = pair(output_size, 'output_size', 1)
    _check(input, rois, offset, size)
    count(sampling_ratio, 'sampling_ratio')
    shape = (rois.shape[0], input.shape[1], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    output_mask: Sequence[bool],
    deterministic: bool,
    aligned: bool = True,
) -> tuple[Tensor, Tensor]:
    check_floating(grad_output, 'grad_output', 4, '[N, C, ph, pw]')
    size = pair(grad_output.shape[2:], 'output_size', 1)
    _check(input, rois, offset, size)
    count(sampling_ratio, 'sampling_ratio')
    check_shape(grad_output, 'grad_output', '[N, C, ph, pw]', rois.shape[0], input.shape[1], *size)
    check_like(grad_output, 'grad_output', input, input.dtype)
    check_output_mask(output_mask, 2, 1, 'offset', offset)
    return (
        empty_gradient(output_mask[0], input, memory_format(input)),
        empty_gradient(output_mask[1], rois if offset is None else offset),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, rois, offset = ctx.saved_tensors
    needs_input, _, needs_offset, *_ = ctx.needs_input_grad
    gradients: tuple[Tensor | None, ...] = (None, None)
    if needs_input or needs_offset:
        *settings, aligned = ctx.settings
        settings += [(needs_input, needs_offset), torch.are_deterministic_algorithms_enabled(), aligned]
        gradients = _pool_backward(grad_output, input, rois, offset, *settings)
    return (
        gradients[0] if needs_input else None,
        None,  # rois
        gradients[1] if needs_offset else None,
        None,  # output_size
        None,  # spatial_scale
        None,  # sampling_ratio
        None,  # gamma
        None,  # aligned
    )


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the reference's backward; it consists of torch's operators, so derivatives of every order work."""
    return pull_back(_reference_backward, ctx.saved_tensors, ctx.settings, grads)


def _numbered(size: int, dim: int | None, rois: Tensor, images: int) -> Tensor:  # [V*N, 5]
    """Merge the regions of V calls into those of one call, in which the image indices of call v begin at v * images."""
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32))  # narrower types cannot represent large indices
    stacked = rois.expand(size, *rois.shape) if dim is None else rois.movedim(dim, 0)
    first = torch.arange(size, dtype=rois.dtype, device=rois.device) * images
    image = stacked[..., :1]
    is_own = (image > -1) & (image < images)  # else the region would lie in an image of another call
    image = torch.where(is_own, image + first[:, None, None], -1)
    return torch.cat([image, stacked[..., 1:]], dim=2).flatten(0, 1)


def _vmap(pool: Callable[..., Tensor], info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Tensor, int]:
    """Merge V calls into one, with V times the regions, and with V times the images unless the calls share them."""
    size = info.batch_size
    input, rois, offset, *settings = arguments
    shared = in_dims[0] is None
    images = input if shared else input.movedim(in_dims[0], 0).flatten(0, 1)
    images_of_call = len(images) // size
    regions = into_batch(size, in_dims[1], rois) if shared else _numbered(size, in_dims[1], rois, images_of_call)
    return unfold(size, 0, pool(images, regions, into_batch(size, in_dims[2], offset), *settings)), 0


def _vmap_backward(
    pool_backward: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Merge V calls into one like `_vmap`, but without shared images: each call has its own gradient of them."""
    size = info.batch_size
    grad_output, input, rois, offset, *settings = arguments
    grads, images, moves = (
        into_batch(size, dim, tensor)
        for dim, tensor in zip((in_dims[0], in_dims[1], in_dims[3]), (grad_output, input, offset), strict=True)
    )
    assert images is not None
    regions = _numbered(size, in_dims[2], rois, len(images) // size)
    gradients = pool_backward(grads, images, regions, moves, *settings)
    dims = tuple(0 if needed else None for needed in settings[3])
    return tuple(grad if d is None else unfold(size, d, grad) for grad, d in zip(gradients, dims, strict=True)), dims


_pool = register('deform_roi_pool', _reference, _setup_context, _backward, _vmap)
_pool_backward = register(
    'deform_roi_pool_backward', _reference_backward, _setup_backward_context, _double_backward, _vmap_backward
)
