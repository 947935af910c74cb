# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d says what is wrong with a call, before anything runs."""

import re
from typing import Any

import pytest
import torch
from deform_conv2d_cases import Recorder
from deform_conv2d_good_call import DOUBLE, FLOATING, HALF, LONG, make_arguments, zeros
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdcn.ops import deform_conv2d

OFFSET_LAYOUT = 'offset must have shape [B, 2*G*K, H_out, W_out] = [3, 24, 4, 6], got shape '
MASK_LAYOUT = 'mask must have shape [B, G*K, H_out, W_out] = [3, 12, 4, 6], got shape '

BAD: dict[str, tuple[dict[str, Any], str]] = {
    # Not a tensor
    'input is a list': (
        {'input': [[0.0]]},
        'input must be a tensor [B, C_in, H, W], got list',
    ),
    'offset is None': (
        {'offset': None},
        'offset must be a tensor [B, 2*G*K, H_out, W_out], got NoneType',
    ),
    'weight is None': (
        {'weight': None},
        'weight must be a tensor [C_out, C_in/groups, kh, kw], got NoneType',
    ),
    'bias is a flag': (
        {'bias': True},
        'bias must be a tensor [C_out], got bool',
    ),
    'mask is a number': (
        {'mask': 1.0},
        'mask must be a tensor [B, G*K, H_out, W_out], got float',
    ),
    'input is sparse': (
        {'input': lambda: torch.zeros(3, 4, 7, 8).to_sparse()},
        'input must be a dense tensor, of layout torch.strided, got torch.sparse_coo',
    ),
    # Rank
    'input without a batch': (
        {'input': zeros(4, 7, 8)},
        'input must have 4 dimensions [B, C_in, H, W], got shape [4, 7, 8]',
    ),
    'input of a video': (
        {'input': zeros(3, 4, 2, 7, 8)},
        'input must have 4 dimensions [B, C_in, H, W], got shape [3, 4, 2, 7, 8]',
    ),
    'offset without a batch': (
        {'offset': zeros(24, 4, 6)},
        'offset must have 4 dimensions [B, 2*G*K, H_out, W_out], got shape [24, 4, 6]',
    ),
    'weight of a linear layer': (
        {'weight': zeros(10, 2)},
        'weight must have 4 dimensions [C_out, C_in/groups, kh, kw], got shape [10, 2]',
    ),
    'bias is a matrix': (
        {'bias': zeros(10, 1)},
        'bias must have 1 dimensions [C_out], got shape [10, 1]',
    ),
    'mask without a batch': (
        {'mask': zeros(12, 4, 6)},
        'mask must have 4 dimensions [B, G*K, H_out, W_out], got shape [12, 4, 6]',
    ),
    # Shape
    'input without channels': (
        {'input': zeros(3, 0, 7, 8)},
        'input must have channels and pixels, got shape [3, 0, 7, 8]',
    ),
    'input without rows': (
        {'input': zeros(3, 4, 0, 8)},
        'input must have channels and pixels, got shape [3, 4, 0, 8]',
    ),
    'weight without outputs': (
        {'weight': zeros(0, 2, 3, 2)},
        'weight must have no empty dimension, got shape [0, 2, 3, 2]',
    ),
    'weight without taps': (
        {'weight': zeros(10, 2, 3, 0)},
        'weight must have no empty dimension, got shape [10, 2, 3, 0]',
    ),
    'weight for other channels': (
        {'weight': zeros(10, 3, 3, 2)},
        'weight must have a C_in/groups that divides the 4 channels of input, got C_in/groups = 3',
    ),
    'weight for more channels': (
        {'weight': zeros(10, 8, 3, 2)},
        'weight must have a C_in/groups that divides the 4 channels of input, got C_in/groups = 8',
    ),
    'outputs that the groups do not divide': (
        {'weight': zeros(9, 2, 3, 2), 'bias': zeros(9)},
        'weight must have a C_out that its 2 groups divide, got C_out = 9',
    ),
    'offsets for other taps': (
        {'offset': zeros(3, 18, 4, 6)},
        'offset must have a positive multiple of 2*K = 12 channels, y and x of each tap, got 18 channels',
    ),
    'offsets without channels': (
        {'offset': zeros(3, 0, 4, 6)},
        'offset must have a positive multiple of 2*K = 12 channels, y and x of each tap, got 0 channels',
    ),
    'offset groups that do not divide the channels': (
        {'offset': zeros(3, 36, 4, 6), 'mask': zeros(3, 18, 4, 6)},
        'offset must have a number of offset groups that divides the 4 channels of input, '
        'got 36 channels, 3 offset groups',
    ),
    'offsets of another batch': (
        {'offset': zeros(1, 24, 4, 6)},
        OFFSET_LAYOUT + '[1, 24, 4, 6]',
    ),
    'offsets of too many rows': (
        {'offset': zeros(3, 24, 5, 6)},
        OFFSET_LAYOUT + '[3, 24, 5, 6]',
    ),
    'offsets of too few columns': (
        {'offset': zeros(3, 24, 4, 5)},
        OFFSET_LAYOUT + '[3, 24, 4, 5]',
    ),
    'offsets of the input size': (
        {'offset': zeros(3, 24, 7, 8)},
        OFFSET_LAYOUT + '[3, 24, 7, 8]',
    ),
    'mask of another batch': (
        {'mask': zeros(1, 12, 4, 6)},
        MASK_LAYOUT + '[1, 12, 4, 6]',
    ),
    'mask of one offset group': (
        {'mask': zeros(3, 6, 4, 6)},
        MASK_LAYOUT + '[3, 6, 4, 6]',
    ),
    'mask with the channels of the offsets': (
        {'mask': zeros(3, 24, 4, 6)},
        MASK_LAYOUT + '[3, 24, 4, 6]',
    ),
    'mask of another size': (
        {'mask': zeros(3, 12, 6, 4)},
        MASK_LAYOUT + '[3, 12, 6, 4]',
    ),
    'bias of another length': (
        {'bias': zeros(4)},
        'bias must have shape [C_out] = [10], got shape [4]',
    ),
    'bias of one number': (
        {'bias': zeros(1)},
        'bias must have shape [C_out] = [10], got shape [1]',
    ),
    # Geometry
    'stride 0': (
        {'stride': 0},
        'stride must be at least 1, got 0',
    ),
    'stride 0 along x': (
        {'stride': (2, 0)},
        'stride must be at least 1, got (2, 0)',
    ),
    'negative stride': (
        {'stride': (-1, 1)},
        'stride must be at least 1, got (-1, 1)',
    ),
    'fractional stride': (
        {'stride': 1.5},
        'stride must be an integer or a pair (y, x) of integers, got 1.5',
    ),
    'three strides': (
        {'stride': (1, 1, 1)},
        'stride must be an integer or a pair (y, x) of integers, got (1, 1, 1)',
    ),
    'no stride': (
        {'stride': None},
        'stride must be an integer or a pair (y, x) of integers, got None',
    ),
    'negative padding': (
        {'padding': -1},
        'padding must be at least 0, got -1',
    ),
    'padding by a word': (
        {'padding': 'same'},
        "padding must be an integer or a pair (y, x) of integers, got 'same'",
    ),
    'padding with one entry': (
        {'padding': [1]},
        'padding must be an integer or a pair (y, x) of integers, got [1]',
    ),
    'dilation 0': (
        {'dilation': 0},
        'dilation must be at least 1, got 0',
    ),
    'negative dilation along x': (
        {'dilation': [1, -2]},
        'dilation must be at least 1, got [1, -2]',
    ),
    'pair of fractions': (
        {'dilation': (1.0, 2.0)},
        'dilation must be an integer or a pair (y, x) of integers, got (1.0, 2.0)',
    ),
    'input lower than the kernel': (
        {'input': zeros(3, 4, 1, 8), 'padding': 0},
        'input must be large enough for a 3 x 2 kernel with padding (0, 0) and dilation (1, 2); '
        'the output would be empty, got 1 x 8 pixels',
    ),
    'input narrower than the dilated kernel': (
        {'input': zeros(3, 4, 7, 2)},
        'input must be large enough for a 3 x 2 kernel with padding (1, 0) and dilation (1, 2); '
        'the output would be empty, got 7 x 2 pixels',
    ),
    'padding that overflows': (
        {'padding': 2**62 - 1},
        'padding must be less than 2^31, got 4611686018427387903',
    ),
    'stride of more than 64 bits': (
        {'stride': (1, 2**70)},
        f'stride must be less than 2^31, got (1, {2**70})',
    ),
    'dilation of 32 bits': (
        {'dilation': [2**31, 1]},
        'dilation must be less than 2^31, got [2147483648, 1]',
    ),
    # Type
    'input of integers': (
        {'input': zeros(3, 4, 7, 8, dtype=LONG)},
        f'input must be of type {FLOATING}, got torch.int64',
    ),
    'complex input': (
        {'input': zeros(3, 4, 7, 8, dtype=torch.complex64)},
        f'input must be of type {FLOATING}, got torch.complex64',
    ),
    'input of bytes': (
        {'input': zeros(3, 4, 7, 8, dtype=torch.float8_e4m3fn)},
        f'input must be of type {FLOATING}, got torch.float8_e4m3fn',
    ),
    'offsets of integers': (
        {'offset': zeros(3, 24, 4, 6, dtype=LONG)},
        f'offset must be of type {FLOATING}, got torch.int64',
    ),
    'weight in double': (
        {'weight': zeros(10, 2, 3, 2, dtype=DOUBLE)},
        'weight must be of type torch.float32, got torch.float64',
    ),
    'weight of booleans': (
        {'weight': zeros(10, 2, 3, 2, dtype=torch.bool)},
        f'weight must be of type {FLOATING}, got torch.bool',
    ),
    'offsets in double': (
        {'offset': zeros(3, 24, 4, 6, dtype=DOUBLE), 'mask': zeros(3, 12, 4, 6, dtype=DOUBLE)},
        'offset must be of type torch.float32, got torch.float64',
    ),
    'offsets narrower than the input': (
        {'offset': zeros(3, 24, 4, 6, dtype=HALF), 'mask': zeros(3, 12, 4, 6, dtype=HALF)},
        'offset must be of type torch.float32, got torch.float16',
    ),
    'offsets in the other narrow type': (
        {
            'input': zeros(3, 4, 7, 8, dtype=HALF),
            'weight': zeros(10, 2, 3, 2, dtype=HALF),
            'bias': zeros(10, dtype=HALF),
            'offset': zeros(3, 24, 4, 6, dtype=torch.bfloat16),
        },
        'offset must be of type torch.float16 or torch.float32, got torch.bfloat16',
    ),
    'mask narrower than the offsets': (
        {'mask': zeros(3, 12, 4, 6, dtype=HALF)},
        'mask must be of type torch.float32, got torch.float16',
    ),
    'bias in double': (
        {'bias': zeros(10, dtype=DOUBLE)},
        'bias must be of type torch.float32, got torch.float64',
    ),
    # Device
    'weight elsewhere': (
        {'weight': zeros(10, 2, 3, 2, device='meta')},
        'weight must be on the device of input, cpu, got meta',
    ),
    'offsets elsewhere': (
        {'offset': zeros(3, 24, 4, 6, device='meta')},
        'offset must be on the device of input, cpu, got meta',
    ),
    'mask elsewhere': (
        {'mask': zeros(3, 12, 4, 6, device='meta')},
        'mask must be on the device of input, cpu, got meta',
    ),
    'bias elsewhere': (
        {'bias': zeros(10, device='meta')},
        'bias must be on the device of input, cpu, got meta',
    ),
    'input elsewhere': (
        {'input': zeros(3, 4, 7, 8, device='meta')},
        'weight must be on the device of input, meta, got cpu',
    ),
}
each_bad_call = pytest.mark.parametrize(('changes', 'message'), BAD.values(), ids=BAD.keys())


def test_the_call_that_the_bad_ones_are_made_from_is_good() -> None:
    assert deform_conv2d(**make_arguments({})).shape == (3, 10, 4, 6)


def test_there_are_at_least_40_bad_calls() -> None:
    assert len(BAD) >= 40


@each_bad_call
def test_a_bad_call_raises_a_value_error_and_reaches_no_kernel(changes: dict[str, Any], message: str) -> None:
    """The message tells what was wrong."""
    arguments = make_arguments(changes)
    with Recorder() as recorder, pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        deform_conv2d(**arguments)
    assert not recorder.calls


@each_bad_call
def test_a_bad_call_of_fake_tensors_raises_the_same(changes: dict[str, Any], message: str) -> None:
    if 'sparse' in message:
        pytest.skip('a FakeTensor has no sparse layout')
    with FakeTensorMode():
        arguments = make_arguments(changes)
        with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
            deform_conv2d(**arguments)


@each_bad_call
def test_a_bad_call_under_autocast_is_a_value_error_too(changes: dict[str, Any], message: str) -> None:
    """Where autocast does not mend the types."""
    arguments = make_arguments(changes)
    with torch.autocast('cpu', torch.bfloat16):
        try:
            deform_conv2d(**arguments)
        except ValueError:
            return
    assert 'type' in message


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'offset': zeros(1, 24, 4, 6)}, 'offset must have shape'),
        ({'mask': zeros(3, 12, 6, 4)}, 'mask must have shape'),
        ({'bias': zeros(1)}, 'bias must have shape'),
        ({'bias': zeros(10, dtype=DOUBLE)}, 'bias must be of type'),
    ],
)
def test_forward_mode_refuses_what_the_reference_would_broadcast(changes: dict[str, Any], message: str) -> None:
    arguments = make_arguments(changes)
    input = arguments.pop('input')
    with pytest.raises(ValueError, match=f'^{message}'):
        torch.func.jvp(lambda input: deform_conv2d(input, **arguments), (input,), (input,))
