# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_roi_pool says what is wrong with a call, and the operator itself refuses bad calls too."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from deform_roi_pool_cases import CASES, draw_grad_output
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdcn.ops import deform_roi_pool

GOOD = CASES['defaults'].draw(torch.float32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    'input is a list': ({'input': [0.0]}, 'input must be a tensor [B, C, H, W], got list'),
    'input without a batch': (
        {'input': GOOD.input[0]},
        'input must have 4 dimensions [B, C, H, W], got shape [3, 9, 12]',
    ),
    'input without pixels': (
        {'input': GOOD.input[..., :0]},
        'input must have channels and pixels, got shape [2, 3, 9, 0]',
    ),
    'regions without an image': (
        {'rois': GOOD.rois[:, 1:]},
        'rois must have shape [N, 5], (image, x1, y1, x2, y2) = [5, 5], got shape [5, 4]',
    ),
    'one region': ({'rois': GOOD.rois[0]}, 'rois must have 2 dimensions [N, 5], got shape [5]'),
    'regions of integers': (
        {'rois': GOOD.rois.long()},
        'rois must be of type float64, float32, float16 or bfloat16, got torch.int64',
    ),
    'regions in float64': ({'rois': GOOD.rois.double()}, 'rois must be of type torch.float32, got torch.float64'),
    'low regions in another type': (
        {'input': GOOD.input.half(), 'rois': GOOD.rois.bfloat16()},
        'rois must be of type torch.float16 or torch.float32, got torch.bfloat16',
    ),
    'offsets of other bins': (
        {'offset': GOOD.offset[..., :2]},
        'offset must have shape [N, 2, ph, pw] = [5, 2, 2, 3], got shape [5, 2, 2, 2]',
    ),
    'offsets of other regions': (
        {'offset': GOOD.offset[:4]},
        'offset must have shape [N, 2, ph, pw] = [5, 2, 2, 3], got shape [4, 2, 2, 3]',
    ),
    'offsets on another device': (
        {'offset': GOOD.offset.to('meta')},
        'offset must be on the device of input, cpu, got meta',
    ),
    'no bins': ({'output_size': (2, 0)}, 'output_size must be at least 1, got (2, 0)'),
    'three sizes': (
        {'output_size': (2, 3, 4)},
        'output_size must be an integer or a pair (y, x) of integers, got (2, 3, 4)',
    ),
    'fewer than no samples': ({'sampling_ratio': -1}, 'sampling_ratio must be an integer, 0 or more, got -1'),
    'bins that overflow': ({'output_size': 2**62}, f'output_size must be less than 2^31, got {2**62}'),
    'samples that overflow': ({'sampling_ratio': 2**63}, f'sampling_ratio must be less than 2^31, got {2**63}'),
    'half a sample': ({'sampling_ratio': 0.5}, 'sampling_ratio must be an integer, 0 or more, got 0.5'),
}


@pytest.mark.parametrize(('changes', 'message'), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named_with_what_it_was_and_what_it_should_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        replace(GOOD, **changes)(deform_roi_pool)


BAD_FOR_OPERATOR: dict[str, dict[str, Any]] = {
    'rois of four numbers': {'rois': GOOD.rois[:, :4]},
    'rois wider than the input': {'rois': GOOD.rois.double()},
    'offset of fewer regions': {'offset': GOOD.offset[:4]},
    'offset wider than the input': {'offset': GOOD.offset.double()},
    'no bin': {'output_size': (0, 3)},
    'negative bins': {'output_size': (2, -3)},
    'three sizes': {'output_size': (2, 3, 1)},
    'bins that overflow': {'output_size': (2**62, 4)},
    'bins of 32 bits': {'output_size': (2, 2**31)},
    'negative sampling ratio': {'sampling_ratio': -1},
    'sampling ratio that overflows': {'sampling_ratio': 2**63 - 1},
}


@pytest.mark.parametrize('changes', BAD_FOR_OPERATOR.values(), ids=BAD_FOR_OPERATOR.keys())
@pytest.mark.parametrize(('mode', 'error'), [(nullcontext, RuntimeError), (FakeTensorMode, ValueError)])
def test_the_operator_itself_refuses_what_it_would_read_outside_of(
    mode: Callable[[], Any], error: type[Exception], changes: dict[str, Any]
) -> None:
    """Its fake and its backward refuse the same."""
    with mode() as context:
        fake = context.from_tensor if context else torch.clone
        call = replace(GOOD, **changes).map(fake)
        settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
        with pytest.raises(error, match=' must '):
            torch.ops.mmdcn.deform_roi_pool(call.input, call.rois, call.offset, call.output_size, *settings)
        if 'output_size' in changes:
            return
        grad_output = draw_grad_output(GOOD)
        with pytest.raises(error, match=' must '):
            torch.ops.mmdcn.deform_roi_pool_backward(
                fake(grad_output), call.input, call.rois, call.offset, *settings, [True, True], False
            )


@pytest.mark.parametrize(
    ('grad_output', 'offset', 'output_mask'),
    [
        (draw_grad_output(GOOD)[0], GOOD.offset, [True, True]),
        (draw_grad_output(GOOD)[:-1], None, [True, False]),
        (draw_grad_output(GOOD)[:, :-1], None, [True, False]),
        (draw_grad_output(GOOD).double(), GOOD.offset, [True, True]),
        (draw_grad_output(GOOD), GOOD.offset, [True]),
        (draw_grad_output(GOOD), None, [True, True]),
    ],
    ids=['rank', 'regions', 'channels', 'type', 'short output_mask', 'no offset'],
)
def test_the_backward_operator_itself_and_its_fake_do_too(
    grad_output: Tensor, offset: Tensor | None, output_mask: list[bool]
) -> None:
    def call(change: Callable[[Tensor], Tensor]) -> None:
        tensors = [
            tensor if tensor is None else change(tensor) for tensor in (grad_output, GOOD.input, GOOD.rois, offset)
        ]
        settings = (GOOD.spatial_scale, GOOD.sampling_ratio, GOOD.gamma)
        torch.ops.mmdcn.deform_roi_pool_backward(*tensors, *settings, output_mask, False)

    with pytest.raises(RuntimeError, match=r' must |asks for'):
        call(torch.clone)
    with FakeTensorMode() as fake, pytest.raises(ValueError, match=r' must |asks for'):
        call(fake.from_tensor)
