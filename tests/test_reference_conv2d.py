# SPDX-License-Identifier: Apache-2.0
"""mmdcn.reference.conv2d against torch.nn.functional and its autograd.

Note: [Why the tolerance is zero]
In any order of its additions, a sum of n products is off by at most about
n * eps / 2 * sum(|x| * |w|), and by nothing at all where no step has to round. The tensors here
hold whole numbers up to 1000 and no sum has more than 1000 terms, so that all products and all
partial sums are whole numbers up to 1e9; the adjoint identity multiplies such sums by up to 1000
and adds up less than 1000 of them, which makes 1e15. float64 holds every whole number up to
2**53, or 9e15: nothing rounds, and whatever differs is wrong.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcn.reference import conv2d as reference
from mmdcn.reference.geometry import IntPair, output_size, pair

BATCH = 2


class Case(NamedTuple):
    channels: tuple[int, int]  # in, out
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: IntPair = 1
    padding: IntPair = 0
    dilation: IntPair = 1
    groups: int = 1

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return (BATCH, self.channels[0], *self.size)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.channels[1], self.channels[0] // self.groups, *self.kernel)

    @property
    def remainder(self) -> tuple[int, int]:
        """The rows and columns at the far side that no window begins in."""
        settings = map(pair, (self.stride, self.padding, self.dilation))
        axes = zip(self.size, self.kernel, *settings, strict=True)
        y, x = ((n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in axes)
        return y, x

    @property
    def largest_output_padding(self) -> tuple[int, int]:
        """torch wants output_padding below either stride or dilation."""
        axes = zip(pair(self.stride), pair(self.dilation), strict=True)
        y, x = (max(axis) - 1 for axis in axes)
        return y, x


CASES = {
    'defaults': Case((2, 3), (7, 5), (3, 2)),
    'one-pixel kernel': Case((4, 6), (5, 7), (1, 1), groups=2),
    'kernel as large as the input': Case((3, 2), (3, 2), (3, 2)),
    'numbers for pairs': Case((3, 6), (7, 5), (2, 3), 2, 1, 2, groups=3),
    'stride fits': Case((2, 3), (7, 6), (3, 2), stride=(2, 1), padding=(1, 0)),
    'stride leaves a row': Case((2, 3), (8, 5), (3, 2), stride=(2, 1), padding=(1, 0)),
    'stride leaves a column': Case((6, 4), (7, 6), (2, 3), (1, 2), (0, 1), groups=2),
    'stride leaves two rows': Case((6, 3), (7, 5), (3, 2), (3, 2), (2, 3), (2, 1), groups=3),
    'stride skips pixels': Case((3, 6), (7, 5), (1, 1), (3, 2), (1, 0), groups=3),
    'padding wider than the kernel': Case((4, 2), (5, 7), (1, 1), (2, 3), (2, 3), groups=2),
    'dilation': Case((2, 5), (7, 5), (3, 2), padding=(3, 2), dilation=(2, 1)),
    'dilation over stride': Case((4, 6), (9, 7), (2, 3), (1, 2), (1, 0), (4, 3), groups=2),
    'remainder over dilation': Case((6, 3), (9, 7), (2, 3), (3, 3), (2, 3), (1, 2), groups=3),
    'depthwise': Case((3, 3), (7, 5), (2, 3), (2, 1), (1, 0), (2, 1), groups=3),
}

CONVOLUTIONS = (
    reference.conv2d_direct,
    reference.conv2d_windows,
    reference.conv2d_taps,
    reference.conv2d_im2col,
    reference.conv2d_toeplitz,
)
TRANSPOSED_CONVOLUTIONS = (
    reference.conv_transpose2d_scatter,
    reference.conv_transpose2d_upsample,
    reference.conv_transpose2d_toeplitz,
)
WEIGHT_GRADIENTS = (reference.conv2d_grad_weight, reference.conv2d_grad_weight_im2col)

Function = Callable[..., Tensor]
each_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def each(functions: tuple[Function, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize('function', functions, ids=lambda function: function.__name__)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1001, shape, generator=generator, dtype=torch.float64)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Draw input, weight and bias."""
    return (
        whole_numbers(*case.image_shape, seed=1),
        whole_numbers(*case.weight_shape, seed=2),
        whole_numbers(case.channels[1], seed=3),
    )


def torch_gradients(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Draw grad_output, and let autograd turn it into those of input, weight and bias."""
    leaves = tensors(case)
    for leaf in leaves:
        leaf.requires_grad_()
    output = F.conv2d(*leaves, case.stride, case.padding, case.dilation, case.groups)
    grad_output = whole_numbers(*output.shape, seed=4)
    return grad_output, torch.autograd.grad(output, leaves, grad_output)


def assert_identical(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize('axis', [0, 1], ids=['y', 'x'])
def test_the_cases_hold_strides_with_and_without_a_remainder(axis: int) -> None:
    """A remainder: rows or columns at the far side that no window begins in."""
    strided = [case for case in CASES.values() if pair(case.stride)[axis] > 1]
    assert {case.remainder[axis] > 0 for case in strided} == {True, False}


@each_case
@each(CONVOLUTIONS)
def test_a_convolution_equals_torch(function: Function, case: Case) -> None:
    arguments = (*tensors(case), *case[3:])
    assert_identical(function(*arguments), F.conv2d(*arguments))


@each(CONVOLUTIONS)
def test_a_convolution_does_not_depend_on_the_memory_format(function: Function) -> None:
    case = CASES['stride leaves two rows']
    input, weight, bias = tensors(case)
    expected = function(input, weight, bias, *case[3:])
    channels_last = input.to(memory_format=torch.channels_last)
    across = weight.mT.contiguous().mT
    assert_identical(function(channels_last, across, bias, *case[3:]), expected)


def test_a_kernel_larger_than_the_padded_input_is_an_error() -> None:
    assert output_size(3, kernel=3, stride=1, padding=1, dilation=2) == 1
    with pytest.raises(ValueError, match='spans 5 pixels, but the padded input has only 4'):
        output_size(2, kernel=3, stride=1, padding=1, dilation=2)


@each_case
def test_the_toeplitz_matrix_has_an_entry_for_each_pixel_that_a_tap_reads(case: Case) -> None:
    _, weight, _ = tensors(case)
    matrix = reference.toeplitz_matrix(weight, case.size, *case[3:])
    image = torch.ones(1, *case.image_shape[1:], dtype=torch.float64)
    pixels_read = F.conv2d(image, torch.ones_like(weight), None, *case[3:])
    assert matrix.shape == (pixels_read.numel(), image.numel())
    assert matrix._nnz() == pixels_read.sum().item()


@each_case
@each(TRANSPOSED_CONVOLUTIONS)
@pytest.mark.parametrize('largest', [False, True], ids=['unpadded', 'largest output_padding'])
def test_a_transposed_convolution_equals_torch(function: Function, case: Case, largest: bool) -> None:
    c_in, c_out = case.channels
    input, _, bias = tensors(case)
    weight = whole_numbers(c_in, c_out // case.groups, *case.kernel, seed=2)
    output_padding = case.largest_output_padding if largest else 0
    arguments = (case.stride, case.padding, output_padding, case.groups, case.dilation)
    expected = F.conv_transpose2d(input, weight, bias, *arguments)
    assert_identical(function(input, weight, bias, *arguments), expected)


@each_case
@each(TRANSPOSED_CONVOLUTIONS)
def test_a_transposed_convolution_is_the_adjoint_of_the_convolution(function: Function, case: Case) -> None:
    x, weight, _ = tensors(case)
    convolved = reference.conv2d_direct(x, weight, None, *case[3:])
    y = whole_numbers(*convolved.shape, seed=4)
    arguments = (case.stride, case.padding, case.remainder, case.groups, case.dilation)
    transposed = function(y, weight, None, *arguments)
    assert_identical((convolved * y).sum(), (x * transposed).sum())


@each_case
def test_the_gradient_of_the_input_equals_autograd(case: Case) -> None:
    _, weight, _ = tensors(case)
    grad_output, (expected, _, _) = torch_gradients(case)
    actual = reference.conv2d_grad_input(case.image_shape, weight, grad_output, *case[3:])
    assert_identical(actual, expected)


@each_case
@each(WEIGHT_GRADIENTS)
def test_the_gradient_of_the_weight_equals_autograd(function: Function, case: Case) -> None:
    input, _, _ = tensors(case)
    grad_output, (_, expected, _) = torch_gradients(case)
    assert_identical(function(input, case.weight_shape, grad_output, *case[3:]), expected)


@each_case
def test_the_gradient_of_the_bias_equals_autograd(case: Case) -> None:
    grad_output, (_, _, expected) = torch_gradients(case)
    assert_identical(reference.conv2d_grad_bias(grad_output), expected)
