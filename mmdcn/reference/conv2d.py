# SPDX-License-Identifier: Apache-2.0
"""The convolution family from first principles: slow, plain, and equal to torch.nn.functional.

There are five ways to convolve, three ways to convolve transposed, and the backward of a convolution.
Every function takes the arguments of its counterpart in torch.nn.functional; the gradients take
those of torch.nn.grad.

Note: [One sum, read five ways]
A convolution is one sum of products over input channels c and taps (i, j):

    output[b, o, y, x] = sum over c, i, j of
        weight[o, c, i, j] * padded[b, c, y * stride + i * dilation, x * stride + j * dilation]

    fix (y, x), sum over (c, i, j)     a window slides over the image      conv2d_direct
    stack the windows as rows          one matrix product                  conv2d_windows
    fix (i, j), sum over c             a 1x1 convolution of a shifted view conv2d_taps
    walk (i, j) and (y, x) by strides  a view that holds every window      conv2d_im2col
    collect the factor of each pixel   a matrix that acts on whole images  conv2d_toeplitz

Positions and taps enter the sum symmetrically: exchanging stride and dilation exchanges their roles.
Therefore `geometry.lattice` serves both readings, and the gradient of the weight is again a convolution.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcn.reference.geometry import (
    IntPair,
    add_bias,
    lattice,
    output_shape,
    pad,
    pair,
    positions,
    split_groups,
    transposed_output_shape,
)


def conv2d_direct(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Slide the window: multiply and add what lies under the kernel, one position at a time."""
    kernel = weight.shape[2:]
    image = split_groups(pad(input, padding), 1, groups).unsqueeze(2)  # [B, G, 1, C_in / G, ...]
    kernels = split_groups(weight, 0, groups)  # [G, C_out / G, C_in / G, K_h, K_w]
    shape = output_shape(input.shape[2:], kernel, stride, padding, dilation)
    output = input.new_empty(len(input), len(weight), *shape)
    for y, x in positions(shape):
        rows, columns = lattice((y, x), stride, dilation, kernel)
        products = image[..., rows, columns] * kernels
        output[..., y, x] = products.sum((-3, -2, -1)).flatten(1)
    return add_bias(output, bias)


def conv2d_windows(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Copy each window into a row of N numbers, then multiply the rows by the flattened kernels."""
    kernel = weight.shape[2:]
    shape = output_shape(input.shape[2:], kernel, stride, padding, dilation)
    axes = zip(shape, pair(stride), kernel, pair(dilation), strict=True)
    rows, columns = (
        torch.arange(n)[:, None] * s + torch.arange(k) * d for n, s, k, d in axes
    )  # [H_out, K_h], [W_out, K_w]
    windows = pad(input, padding)[:, :, rows[:, None, :, None], columns[:, None, :]]
    grouped = split_groups(windows, 1, groups)  # [B, G, C_in / G, H_out, W_out, K_h, K_w]
    flat = grouped.permute(1, 0, 3, 4, 2, 5, 6).flatten(4).flatten(1, 3)  # [G, B H_out W_out, N]
    kernels = split_groups(weight, 0, groups).flatten(2)  # [G, C_out / G, N]
    output = (flat @ kernels.mT).reshape(groups, len(input), *shape, -1)
    return add_bias(output.permute(1, 0, 4, 2, 3).flatten(1, 2), bias)


def conv2d_taps(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Add up one 1x1 convolution per tap, each over a shifted view of the NHWC image."""
    kernel = weight.shape[2:]
    image = split_groups(pad(input, padding).permute(0, 2, 3, 1), -1, groups)
    kernels = split_groups(weight, 0, groups)  # [G, C_out / G, C_in / G, K_h, K_w]
    shape = output_shape(input.shape[2:], kernel, stride, padding, dilation)
    output = input.new_zeros(len(input), *shape, *kernels.shape[:2])
    for i, j in positions(kernel):
        rows, columns = lattice((i, j), dilation, stride, shape)
        output += torch.einsum('byxgc,goc->byxgo', image[:, rows, columns], kernels[..., i, j])
    return add_bias(output.flatten(3).permute(0, 3, 1, 2), bias)


def im2col(
    input: Tensor,  # [B, C_in, H, W]
    kernel: Iterable[int],
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, groups, C_in / groups * K_h * K_w, H_out * W_out]
    """Lay the windows out as columns.

    A step to the next tap and a step to the next position are both steps in the padded image, so
    the windows are a strided view of it; only the flattening copies.
    """
    k_h, k_w = kernel
    shape = output_shape(input.shape[2:], (k_h, k_w), stride, padding, dilation)
    image = split_groups(pad(input, padding), 1, groups)
    *outer, row, column = image.stride()
    (stride_y, stride_x), (dilation_y, dilation_x) = pair(stride), pair(dilation)
    steps = (dilation_y * row, dilation_x * column, stride_y * row, stride_x * column)
    windows = image.as_strided((*image.shape[:3], k_h, k_w, *shape), (*outer, *steps))
    return windows.flatten(5).flatten(2, 4)


def conv2d_im2col(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Multiply the flattened kernels by the columns of im2col."""
    kernel = weight.shape[2:]
    shape = output_shape(input.shape[2:], kernel, stride, padding, dilation)
    kernels = split_groups(weight, 0, groups).flatten(2)  # [G, C_out / G, C_in / G * K_h * K_w]
    output = kernels @ im2col(input, kernel, stride, padding, dilation, groups)
    return add_bias(output.reshape(len(input), -1, *shape), bias)


def toeplitz_matrix(
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    input_size: Iterable[int],  # (H, W)
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [C_out * H_out * W_out, C_in * H * W], sparse COO
    """Build the matrix that maps a flattened image to the flattened output of the convolution.

    At stride 1 its blocks, one per pair of channels, are Toeplitz matrices of Toeplitz matrices:
    constant along diagonals. Taps that read the padding have no entry.
    """
    height, width = input_size
    c_out, c_group, k_h, k_w = weight.shape
    h_out, w_out = output_shape((height, width), (k_h, k_w), stride, padding, dilation)
    (stride_y, stride_x), (pad_y, pad_x) = pair(stride), pair(padding)
    dilation_y, dilation_x = pair(dilation)

    indices = (torch.arange(n, device=weight.device) for n in (*weight.shape, h_out, w_out))
    o, c, i, j, out_y, out_x = torch.meshgrid(*indices, indexing='ij')
    y = out_y * stride_y + i * dilation_y - pad_y
    x = out_x * stride_x + j * dilation_x - pad_x
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    in_channel = o // (c_out // groups) * c_group + c
    entries = torch.stack(((o * h_out + out_y) * w_out + out_x, (in_channel * height + y) * width + x))
    size = (c_out * h_out * w_out, groups * c_group * height * width)
    values = weight[o, c, i, j][inside]
    matrix = torch.sparse_coo_tensor(entries[:, inside], values, size, check_invariants=True)
    return matrix.coalesce()


def conv2d_toeplitz(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Multiply every flattened image by the Toeplitz matrix."""
    size = input.shape[2:]
    matrix = toeplitz_matrix(weight, size, stride, padding, dilation, groups)
    shape = output_shape(size, weight.shape[2:], stride, padding, dilation)
    output = (matrix @ input.flatten(1).T).T
    return add_bias(output.reshape(len(input), -1, *shape), bias)


def conv_transpose2d_scatter(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_in, C_out / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Let every pixel add its multiple of the kernel to a padded canvas, then crop the padding.

    All pixels add the same tap at once: for one tap, no two of them write to the same position.
    """
    kernel = weight.shape[2:]
    (pad_y, pad_x), size = pair(padding), input.shape[2:]
    height, width = transposed_output_shape(size, kernel, stride, padding, output_padding, dilation)
    image = split_groups(input, 1, groups)
    kernels = split_groups(weight, 0, groups)  # [G, C_in / G, C_out / G, K_h, K_w]
    canvas = input.new_zeros(len(input), groups, weight.shape[1], height + 2 * pad_y, width + 2 * pad_x)
    for i, j in positions(kernel):
        rows, columns = lattice((i, j), dilation, stride, size)
        canvas[..., rows, columns] += torch.einsum('bgcyx,gco->bgoyx', image, kernels[..., i, j])
    output = canvas[..., pad_y : pad_y + height, pad_x : pad_x + width]
    return add_bias(output.flatten(1, 2), bias)


def conv_transpose2d_upsample(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_in, C_out / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Space the pixels `stride` apart, fill the gaps with zeros, and convolve with the flipped kernel.

    Note: [A transposed convolution reads through the flipped kernel]
    Scattering sends input position y through tap i to output y * stride + i * dilation - padding.
    Seen from output position z, tap i comes from the upsampled position

        y * stride = z + padding - i * dilation
                   = z + i' * dilation - (dilation * (K - 1) - padding)    with i' = K - 1 - i,

    which is a convolution of stride 1 with the flipped kernel. The term in brackets is its padding,
    which crops where it is negative. output_padding extends only the far side.
    """
    kernel = weight.shape[2:]
    size = input.shape[2:]
    upsampled_shape = transposed_output_shape(size, (1, 1), stride, 0, 0, 1)
    upsampled = input.new_zeros(*input.shape[:2], *upsampled_shape)
    rows, columns = lattice((0, 0), 0, stride, size)
    upsampled[..., rows, columns] = input

    axes = zip(kernel, pair(dilation), pair(padding), strict=True)
    near_y, near_x = (d * (k - 1) - p for k, d, p in axes)
    extra_y, extra_x = pair(output_padding)
    padded = F.pad(upsampled, (near_x, near_x + extra_x, near_y, near_y + extra_y))

    kernels = split_groups(weight, 0, groups).transpose(1, 2).flatten(0, 1).flip(-2, -1)
    return conv2d_taps(padded, kernels, bias, dilation=dilation, groups=groups)


def conv_transpose2d_toeplitz(
    input: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_in, C_out / groups, K_h, K_w]
    bias: Tensor | None = None,  # [C_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Multiply by the transposed Toeplitz matrix of the convolution in the opposite direction.

    That convolution has more output positions than the input has pixels if output_padding reaches
    the stride (which a larger dilation allows). The input is padded with zeros at these positions.
    """
    kernel, (height, width) = weight.shape[2:], input.shape[2:]
    shape = transposed_output_shape((height, width), kernel, stride, padding, output_padding, dilation)
    full_height, full_width = output_shape(shape, kernel, stride, padding, dilation)
    full = F.pad(input, (0, full_width - width, 0, full_height - height))
    matrix = toeplitz_matrix(weight, shape, stride, padding, dilation, groups)
    output = (matrix.T @ full.flatten(1).T).T
    return add_bias(output.reshape(len(input), -1, *shape), bias)


def conv2d_grad_input(
    input_size: tuple[int, int, int, int],  # (B, C_in, H, W)
    weight: Tensor,  # [C_out, C_in / groups, K_h, K_w]
    grad_output: Tensor,  # [B, C_out, H_out, W_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, C_in, H, W]
    """Send the gradient of the output back to the pixels from which the output was computed.

    Note: [The gradient of the input is a transposed convolution]
    With the Toeplitz matrix M, output = M @ input implies grad_input = M.T @ grad_output: the
    transposed convolution with the same weight. The division in output_size drops the remainder

        (H + 2 * padding - dilation * (K - 1) - 1) % stride,

    the number of rows at the far side that lie beyond the last window. output_padding restores
    them: the transposed convolution must return H rows, but assumes the smallest of all sizes that
    lead to H_out.
    """
    size, kernel = input_size[2:], weight.shape[2:]
    smallest = transposed_output_shape(grad_output.shape[2:], kernel, stride, padding, 0, dilation)
    remainder = (size[0] - smallest[0], size[1] - smallest[1])
    return conv_transpose2d_scatter(grad_output, weight, None, stride, padding, remainder, groups, dilation)


def conv2d_grad_weight(
    input: Tensor,  # [B, C_in, H, W]
    weight_size: tuple[int, int, int, int],  # (C_out, C_in / groups, K_h, K_w)
    grad_output: Tensor,  # [B, C_out, H_out, W_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [C_out, C_in / groups, K_h, K_w]
    """Convolve the input with the gradient of the output.

    Note: [The gradient of the weight is a convolution]
    Differentiating the sum in Note [One sum, read five ways] gives

        grad_weight[o, c, i, j] = sum over b, y, x of
            grad_output[b, o, y, x] * padded[b, c, i * dilation + y * stride, ...],

    a convolution in which images and channels exchange roles, as do stride and dilation. It sums
    over the batch. Its kernel is grad_output, whose taps lie `stride` apart and which moves by
    `dilation`. If rows lie beyond the last window at the far side, this kernel has room for more
    steps than the weight has taps; the surplus is cropped.
    """
    _, _, k_h, k_w = weight_size
    image = split_groups(input, 1, groups).permute(2, 1, 0, 3, 4).flatten(1, 2)
    kernels = grad_output.transpose(0, 1)  # [C_out, B, H_out, W_out]
    grad = conv2d_im2col(image, kernels, None, dilation, padding, stride, groups)
    return grad.transpose(0, 1)[..., :k_h, :k_w]


def conv2d_grad_weight_im2col(
    input: Tensor,  # [B, C_in, H, W]
    weight_size: tuple[int, int, int, int],  # (C_out, C_in / groups, K_h, K_w)
    grad_output: Tensor,  # [B, C_out, H_out, W_out]
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [C_out, C_in / groups, K_h, K_w]
    """Multiply the gradient of the output by the transposed columns, and sum over the images."""
    columns = im2col(input, weight_size[2:], stride, padding, dilation, groups)
    grad = split_groups(grad_output, 1, groups).flatten(3)  # [B, G, C_out / G, H_out * W_out]
    return torch.einsum('bgol,bgnl->gon', grad, columns).reshape(weight_size)


def conv2d_grad_bias(
    grad_output: Tensor,  # [B, C_out, H_out, W_out]
) -> Tensor:  # [C_out]
    """Sum each channel: its bias is added once to every pixel of every image."""
    return grad_output.sum((0, 2, 3))
