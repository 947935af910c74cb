# SPDX-License-Identifier: Apache-2.0
"""torch.ops.mmdcn.deform_conv2d and its fake, called without the checks of mmdcn.ops, refuse bad calls too."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from deform_conv2d_good_call import DOUBLE, FLOATING, HALF, LONG, Make, make_arguments, zeros
from torch._subclasses.fake_tensor import FakeTensorMode


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
    with pytest.raises(RuntimeError, match=f'^{re.escape(message)}'):
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

    with pytest.raises(RuntimeError, match=f'^{re.escape(message)}'):
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
