# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d says what is wrong with a call, before anything runs."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from deform_conv2d_cases import Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdcn.ops import deform_conv2d

Make = Callable[[], Tensor]


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> Make:
    return partial(torch.zeros, shape, dtype=dtype, device=device)


# K = 6 taps, 2 groups, 2 offset groups, output 4 x 6
GOOD: dict[str, Any] = {
    'input': zeros(3, 4, 7, 8),
    'offset': zeros(3, 24, 4, 6),
    'weight': zeros(10, 2, 3, 2),
    'bias': zeros(10),
    'stride': (2, 1),
    'padding': (1, 0),
    'dilation': (1, 2),
    'mask': zeros(3, 12, 4, 6),
}

HALF, DOUBLE, LONG = torch.float16, torch.float64, torch.int64
FLOATING = 'float64, float32, float16 or bfloat16'
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


def make_arguments(changes: dict[str, Any]) -> dict[str, Any]:
    arguments = {**GOOD, **changes}
    return {name: value() if callable(value) else value for name, value in arguments.items()}


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


# The operator itself, called past the checks


def operator_arguments(**changes: Any) -> list[Any]:
    arguments = make_arguments({}) | {'groups': 2, 'offset_groups': 2} | changes
    order = ('input', 'offset', 'mask', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups', 'offset_groups')
    return [value() if callable(value) else value for value in map(arguments.get, order)]


BAD_FOR_OPERATOR: dict[str, tuple[dict[str, Any], str]] = {
    'rank of input': ({'input': zeros(4, 7, 8)}, 'input must have 4 dimensions, got shape [4, 7, 8]'),
    'rank of weight': ({'weight': zeros(10, 2)}, 'weight must have 4 dimensions, got shape [10, 2]'),
    'type of input': ({'input': zeros(3, 4, 7, 8, dtype=LONG)}, f'input must be {FLOATING}, got Long'),
    'type of offset': ({'offset': zeros(3, 24, 4, 6, dtype=LONG)}, f'offset must be {FLOATING}, got Long'),
    'type of weight': ({'weight': zeros(10, 2, 3, 2, dtype=HALF)}, 'weight must be Float, got Half'),
    'type of bias': ({'bias': zeros(10, dtype=HALF)}, 'bias must be Float, got Half'),
    'type of mask': ({'mask': zeros(3, 12, 4, 6, dtype=HALF)}, 'mask must be Float, got Half'),
    'empty input': ({'input': zeros(3, 4, 0, 8)}, 'input and weight must not be empty'),
    'empty weight': ({'weight': zeros(10, 2, 3, 0)}, 'input and weight must not be empty'),
    'groups': ({'groups': 1}, 'weight must have shape [10, 4, 3, 2], got [10, 2, 3, 2]'),
    'groups that do not divide': ({'groups': 3}, 'channels must be divisible by groups and offset_groups'),
    'no groups': ({'groups': 0}, 'groups and offset_groups must be positive'),
    'negative offset groups': ({'offset_groups': -2}, 'groups and offset_groups must be positive'),
    'offset groups': ({'offset_groups': 1}, 'offset must have shape [3, 12, 4, 6], got [3, 24, 4, 6]'),
    'short offsets': ({'offset': zeros(3, 24, 4, 5)}, 'offset must have shape [3, 24, 4, 6], got [3, 24, 4, 5]'),
    'few offsets': ({'offset': zeros(2, 24, 4, 6)}, 'offset must have shape [3, 24, 4, 6], got [2, 24, 4, 6]'),
    'short mask': ({'mask': zeros(3, 11, 4, 6)}, 'mask must have shape [3, 12, 4, 6], got [3, 11, 4, 6]'),
    'short bias': ({'bias': zeros(9)}, 'bias must have shape [10], got [9]'),
    'stride': ({'stride': [0, 1]}, 'stride must be positive, got [0, 1]'),
    'dilation': ({'dilation': [1, -1]}, 'dilation must be positive, got [1, -1]'),
    'padding': ({'padding': [-1, 0]}, 'padding must not be negative, got [-1, 0]'),
    'empty output': ({'dilation': [9, 9]}, 'the output would be empty'),
    # (2 - 3) / 2 + 1 is 1 if the division truncates, and 0 if it rounds down.
    'output of no row by one pixel': (
        {'input': zeros(3, 4, 2, 8), 'padding': [0, 0], 'offset': zeros(3, 24, 1, 6), 'mask': zeros(3, 12, 1, 6)},
        'the output would be empty: 0 x 6',
    ),
    'dilation that overflows': (
        {'padding': [2**30, 0], 'dilation': [2**62, 1]},
        'dilation must be less than 2^31, got [4611686018427387904, 1]',
    ),
    'dilation and padding whose overflows cancel out': (
        {'padding': [2**62, 0], 'dilation': [2**62, 2]},
        'padding must be less than 2^31, got [4611686018427387904, 0]',
    ),
    'stride that overflows': (
        {'stride': [2**63 - 1, 1]},
        'stride must be less than 2^31, got [9223372036854775807, 1]',
    ),
    'offset groups that overflow': ({'offset_groups': 2**62}, 'channels must be divisible by groups and offset_groups'),
    'groups that overflow': ({'groups': 2**63 - 1}, 'channels must be divisible by groups and offset_groups'),
    'offsets wider than the input': ({'offset': zeros(3, 24, 4, 6, dtype=DOUBLE)}, 'offset must be Float, got Double'),
    'three strides': ({'stride': [1, 1, 1]}, 'stride, padding and dilation must have 2 elements each'),
}


@pytest.mark.parametrize(('changes', 'message'), BAD_FOR_OPERATOR.values(), ids=BAD_FOR_OPERATOR.keys())
def test_the_operator_itself_refuses_what_it_would_read_outside_of(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.mmdcn.deform_conv2d(*operator_arguments(**changes))


@pytest.mark.parametrize('changes', [changes for changes, _ in BAD_FOR_OPERATOR.values()], ids=BAD_FOR_OPERATOR.keys())
def test_the_fake_operator_refuses_what_the_operator_refuses(changes: dict[str, Any]) -> None:
    """So does the fake of its backward."""
    with FakeTensorMode():
        arguments = operator_arguments(**changes)
        with pytest.raises(ValueError, match='must'):
            torch.ops.mmdcn.deform_conv2d(*arguments)
        if 'bias' in changes:
            return
        arguments.pop(4)
        with pytest.raises(ValueError, match='must'):
            torch.ops.mmdcn.deform_conv2d_backward(torch.zeros(3, 10, 4, 6), *arguments, [True] * 4, False)


@pytest.mark.parametrize(
    ('grad_output', 'output_mask', 'message'),
    [
        (zeros(3, 10, 4, 5), [True] * 4, 'grad_output must have shape [3, 10, 4, 6], got [3, 10, 4, 5]'),
        (zeros(3, 10, 4, 6, dtype=HALF), [True] * 4, 'grad_output must be Float, got Half'),
        (zeros(3, 10, 4, 6), [True] * 3, 'output_mask must have 4 elements, got 3'),
        (zeros(3, 10, 4, 6), [True] * 4, 'output_mask asks for the gradient of a mask, but there is no mask'),
    ],
    ids=['shape', 'type', 'short output_mask', 'no mask'],
)
def test_the_backward_operator_itself_and_its_fake_do_too(
    grad_output: Make, output_mask: list[bool], message: str
) -> None:
    def call() -> object:
        input, offset, _, weight, _, *settings = operator_arguments()
        return torch.ops.mmdcn.deform_conv2d_backward(
            grad_output(), input, offset, None, weight, *settings, output_mask, False
        )

    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()
    with FakeTensorMode(), pytest.raises(ValueError, match=message.split()[0]):
        call()


def test_the_fake_operator_refuses_groups_that_do_not_fit_the_shapes() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r'groups and offset_groups must be \(2, 2\) by the shapes, got \(1, 2\)'),
    ):
        torch.ops.mmdcn.deform_conv2d(*operator_arguments(groups=1))


@pytest.mark.skipif(torch.__version__ < '2.13', reason='before, torch does not tell a library why a function failed')
def test_too_little_memory_is_reported_in_the_words_of_torch() -> None:
    """An output of 10 GB, in a process that may have 6."""
    code = (
        'import resource, torch\n'
        'from mmdcn.ops import deform_conv2d\n'
        'resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n'
        'offset = torch.zeros(1, 1, 1, 1).expand(1, 2, 200, 200)\n'
        'deform_conv2d(torch.zeros(1, 4, 8, 8), offset, torch.zeros(1 << 16, 4, 1, 1), padding=96)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], check=False, capture_output=True, text=True)
    assert 'RuntimeError: [enforce fail at alloc_cpu.cpp' in done.stderr
    assert "can't allocate memory: you tried to allocate 10485760000 bytes" in done.stderr
