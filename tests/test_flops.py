# SPDX-License-Identifier: Apache-2.0
"""FlopCounterMode counts the operators, forward and backward."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmdcn.ops import deform_conv2d, deform_roi_pool

B, C_IN, C_OUT, HEIGHT, WIDTH, KERNEL, GROUPS = 2, 6, 4, 7, 10, (3, 2), 2
GEOMETRY = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))
OUT = (4, 8)
# Four multiply-adds, each two flops, for each sample of each channel.
SAMPLES = B * C_IN * 6 * 4 * 8
PER_SAMPLE = 8


def flops(run: Callable[[], Tensor], *, tensors: tuple[Tensor, ...] = (), backward: bool = False) -> int:
    for tensor in tensors:
        tensor.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        output = run()
    if backward:
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
    return counter.get_total_flops()


def call() -> dict[str, Tensor]:
    return dict(
        input=torch.randn(B, C_IN, HEIGHT, WIDTH), offset=torch.randn(B, 2 * 3 * 6, *OUT),
        weight=torch.randn(C_OUT, C_IN // GROUPS, *KERNEL), mask=torch.rand(B, 3 * 6, *OUT), bias=torch.randn(C_OUT),
    )  # fmt: skip


def convolution() -> int:
    x = call()
    return flops(lambda: F.conv2d(x['input'], x['weight'], **GEOMETRY, groups=GROUPS))


@pytest.mark.parametrize('masked', [True, False])
def test_the_forward_counts_as_a_convolution_and_its_samples(masked: bool) -> None:
    """A sample counts four multiply-adds."""
    x = call() if masked else dict(call(), mask=None)
    assert flops(lambda: deform_conv2d(**x, **GEOMETRY)) == convolution() + PER_SAMPLE * SAMPLES


@pytest.mark.parametrize(
    ('needed', 'products', 'per_sample'),
    [
        (['weight'], 1, 1),  # it samples again
        (['input'], 1, 1),  # the transposed sampling
        (['offset'], 1, 2),  # slopes in y and x
        (['mask'], 1, 1),
        (['input', 'offset', 'mask'], 1, 4),
        (['input', 'offset', 'mask', 'weight', 'bias'], 2, 5),
        (['bias'], 0, 0),
    ],
    ids=str,
)
def test_the_backward_counts_the_gradients_that_are_needed(needed: list[str], products: int, per_sample: int) -> None:
    x = call()
    count = flops(lambda: deform_conv2d(**x, **GEOMETRY), tensors=tuple(x[name] for name in needed), backward=True)
    assert count == products * convolution() + per_sample * PER_SAMPLE * SAMPLES


# Regions of 5 x 3, 1 x 9 and 0 x 0 pixels of the map, at a scale of 1/2.
ROIS = torch.tensor([[0, 2.0, 2.0, 12.0, 8.0], [1, 0.0, 0.0, 2.0, 18.0], [0, 4.0, 4.0, 4.0, 4.0]])
BINS = (2, 3)
# The bins of the first are 5/3 x 3/2 pixels large, those of the second 1/3 x 9/2.
ADAPTIVE = 6 * (2 * 2 + 1 * 5)
# If it is not aligned, the third has one pixel, and so one sample for each bin.
NOT_ALIGNED = ADAPTIVE + 6


@pytest.mark.parametrize(
    ('ratio', 'aligned', 'samples'),
    [(2, True, 3 * 6 * 4), (0, True, ADAPTIVE), (2, False, 3 * 6 * 4), (0, False, NOT_ALIGNED)],
)
@pytest.mark.parametrize('with_offset', [True, False])
def test_roi_pooling_counts_four_multiply_adds_for_each_sample(
    ratio: int, aligned: bool, samples: int, with_offset: bool
) -> None:
    input, offset = torch.randn(2, 4, 10, 12), torch.zeros(3, 2, *BINS) if with_offset else None
    tensors = (input,) if offset is None else (input, offset)

    def run() -> Tensor:
        return deform_roi_pool(input, ROIS, offset, BINS, 0.5, ratio, aligned=aligned)

    assert flops(run) == PER_SAMPLE * 4 * samples
    # The transposed sampling, and the slopes in y and x.
    assert flops(run, tensors=tensors, backward=True) == PER_SAMPLE * 4 * samples * (3 if with_offset else 1)


@pytest.mark.parametrize('ratio', [0, 3])
def test_without_numbers_a_bin_counts_for_the_least_that_it_has(ratio: int) -> None:
    with FakeTensorMode():
        input, rois = torch.randn(2, 4, 10, 12), torch.zeros(3, 5)
        assert flops(lambda: deform_roi_pool(input, rois, None, BINS, 0.5, ratio)) == 8 * 4 * 18 * (ratio**2 or 1)
    input, rois = torch.randn(2, 4, 10, 12, device='meta'), torch.zeros(3, 5, device='meta')
    assert flops(lambda: deform_roi_pool(input, rois, None, BINS, 0.5, ratio)) == 8 * 4 * 18 * (ratio**2 or 1)


def test_every_operator_is_counted_but_those_that_compare_or_copy() -> None:
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith('mmdcn::')}
    operators = {name for name in operators if not re.search('nms|pack_weight', name)}
    assert operators <= {str(target).replace('.', '::') for target in flop_registry}
