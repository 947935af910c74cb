# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d with NaN and infinite values, at whole pixels and at image borders, on every device."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deform_conv2d_cases import CASES, EXACT, Call, gradients
from torch import Tensor

from mmdcn.ops import deform_conv2d


def sample(image: Tensor, y: float, x: float, dtype: torch.dtype | None = None) -> Call:
    """Sample an image [H, W] at one place, with a kernel of one pixel whose position is (0, 0)."""
    offset = image.new_zeros(1, 2, *image.shape)
    offset[0, 0, 0, 0], offset[0, 1, 0, 0] = y, x
    return Call(image[None, None], offset, image.new_ones(1, 1, 1, 1), None, (1, 1), (0, 0), (1, 1), None)


def sample_gradients(image: Tensor, y: float, x: float) -> dict[str, Any]:
    """Return the sample, its derivative by y and by x, and by the pixels."""
    call = sample(image, y, x)
    grad_output = torch.zeros_like(call.input)
    grad_output[..., 0, 0] = 1
    result = gradients(deform_conv2d, call, grad_output)
    dy, dx = result['offset'][0, :, 0, 0].tolist()
    value = result['output'][0, 0, 0, 0].item()
    return {'value': value, 'dy': dy, 'dx': dx, 'input': result['input'][0, 0]}


def squares(device: str, dtype: torch.dtype = torch.float64) -> Tensor:  # [3, 4]
    """An image that is nowhere linear, so that each cell has slopes of its own."""
    y = torch.arange(3, dtype=dtype, device=device)[:, None]
    x = torch.arange(4, dtype=dtype, device=device)
    return (y + 1) ** 2 + 10 * (x + 1) ** 2


@pytest.mark.parametrize('far', [torch.inf, -torch.inf, 1e30, -1e30, 3.0, -1.0], ids=str)
@pytest.mark.parametrize('axis', [0, 1], ids=['y', 'x'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_offset_out_of_the_image_samples_zero_and_has_no_gradient(
    far: float, axis: int, dtype: torch.dtype, device: str
) -> None:
    image = squares(device, dtype)[:, :3]
    result = sample_gradients(image, *((far, 0.5) if axis == 0 else (0.5, far)))
    assert (result['value'], result['dy'], result['dx']) == (0, 0, 0)
    assert not result['input'].any()


@pytest.mark.parametrize('other', [0.5, torch.nan, torch.inf, 1e30], ids=str)
@pytest.mark.parametrize('axis', [0, 1], ids=['y', 'x'])
def test_a_nan_offset_gives_nan_at_its_output_position_alone(axis: int, other: float, device: str) -> None:
    image = squares(device)
    call = sample(image, *((torch.nan, other) if axis == 0 else (other, torch.nan)))
    output = call(deform_conv2d)[0, 0]
    assert output[0, 0].isnan()
    torch.testing.assert_close(output.flatten()[1:], image.flatten()[1:], **EXACT)


def test_a_nan_offset_gives_no_other_sample_nan_gradients(device: str) -> None:
    """It and the weight get them: the weight's gradient is a sum over the samples."""
    call = sample(squares(device), torch.nan, 0.5)
    result = gradients(deform_conv2d, call, torch.ones_like(call.input))
    assert result['offset'][0, :, 0, 0].isnan().all()
    assert result['weight'].isnan().all()
    assert not result['offset'].flatten(2)[..., 1:].isnan().any()
    assert not result['input'].isnan().any()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf], ids=str)
def test_a_nan_or_infinite_pixel_reaches_only_samples_beside_it(bad: float, device: str) -> None:
    """Beside it are the four cells that it is a corner of."""
    image = squares(device)
    image[1, 1] = bad
    for y, x in product((-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5), (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)):
        result = sample_gradients(image, y, x)
        touched = 0 <= y < 2 and 0 <= x < 2  # the cell of (y, x) has the pixel at a corner
        assert (result['value'] == result['value'] and abs(result['value']) < 1e9) != touched, (y, x)
        assert result['input'].isfinite().all()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf], ids=str)
def test_an_image_full_of_nan_does_not_leak_into_samples_outside(bad: float, device: str) -> None:
    call = CASES['everything at once'].draw(device=device)
    call = replace(call, input=torch.full_like(call.input, bad), offset=torch.full_like(call.offset, 1e4))
    expected = torch.zeros_like(call(deform_conv2d)) + call.bias[:, None, None]
    torch.testing.assert_close(call(deform_conv2d), expected, **EXACT)


@pytest.mark.parametrize('y', [0.0, 1.0])
@pytest.mark.parametrize('x', [0.0, 1.0, 2.0])
def test_at_integer_coordinates_the_derivative_is_one_sided(y: float, x: float, device: str) -> None:
    """It is the difference to the next pixel, below or to the right."""
    image = squares(device)
    result = sample_gradients(image, y, x)
    row, column = int(y), int(x)
    assert result['value'] == image[row, column]
    assert result['dy'] == image[row + 1, column] - image[row, column]
    assert result['dx'] == image[row, column + 1] - image[row, column]


def test_at_the_last_pixel_the_derivative_is_one_sided_too(device: str) -> None:
    """It is the difference to the zero outside."""
    image = squares(device)
    result = sample_gradients(image, 2.0, 3.0)
    assert (result['value'], result['dy'], result['dx']) == (image[2, 3], -image[2, 3], -image[2, 3])


@pytest.mark.parametrize(('y', 'x'), [(-1.0, 1.0), (1.0, -1.0), (3.0, 1.0), (1.0, 4.0)])
def test_one_pixel_out_of_the_image_value_and_derivative_are_zero(y: float, x: float, device: str) -> None:
    result = sample_gradients(squares(device), y, x)
    assert (result['value'], result['dy'], result['dx']) == (0, 0, 0)


@pytest.mark.parametrize(('y', 'x'), [(-0.25, 1.5), (2.25, 1.5), (1.5, -0.25), (1.5, 3.25), (-0.25, 3.25)])
def test_within_one_pixel_of_the_image_a_sample_fades_to_zero(y: float, x: float, device: str) -> None:
    image = squares(device)
    padded = F.pad(image, (1, 1, 1, 1))
    top, left = int(y + 1), int(x + 1)  # in the padded image
    fy, fx = y + 1 - top, x + 1 - left
    v = padded[top : top + 2, left : left + 2]
    result = sample_gradients(image, y, x)
    rows, columns = torch.tensor([1 - fy, fy]).to(v), torch.tensor([1 - fx, fx]).to(v)
    assert result['value'] == pytest.approx((rows @ v @ columns).item())
    assert result['dy'] == pytest.approx(((v[1] - v[0]) @ columns).item())
    assert result['dx'] == pytest.approx(((v[:, 1] - v[:, 0]) @ rows).item())
    assert result['input'].sum().item() == pytest.approx(
        (F.pad(torch.ones_like(image), (1, 1, 1, 1))[top : top + 2, left : left + 2] * torch.outer(rows, columns))
        .sum()
        .item()
    )
