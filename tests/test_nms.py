# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.nms, soft_nms and nms_match: what is kept, ties, types and errors."""

import pytest
import torch
from nms_cases import draw
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdcn import reference
from mmdcn.ops import nms, nms_match, soft_nms

each_offset = pytest.mark.parametrize('offset', [0, 1])
each_count = pytest.mark.parametrize('count', [0, 1, 2, 63, 64, 65, 300])


@each_count
@each_offset
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.5, 1.0])
def test_nms_keeps_what_the_reference_keeps(count: int, offset: int, threshold: float, device: str) -> None:
    boxes, scores = draw(count, device)
    actual = nms(boxes, scores, threshold, offset)
    assert actual.dtype == torch.int64 and actual.device == boxes.device
    # On the same device, whose sort decides the order of equal scores.
    assert actual.tolist() == reference.nms(boxes, scores, threshold, offset).tolist()


@each_count
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@each_offset
def test_soft_nms_gives_the_boxes_and_scores_of_the_reference(
    count: int, method: str, offset: int, device: str
) -> None:
    boxes = draw(count, device)[0]
    boxes[:, 2:] += 1  # the overlap of two boxes of no size is no number
    scores = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    dets, indices = soft_nms(boxes, scores, 0.3, 0.5, 0.01, method, offset)
    expected, numbers = reference.soft_nms(boxes.cpu(), scores.cpu(), 0.3, 0.5, 0.01, method, offset)
    torch.testing.assert_close(dets.cpu(), expected)
    assert indices.tolist() == numbers.tolist()


@each_count
@pytest.mark.parametrize('threshold', [0.1, 0.5])
def test_nms_match_groups_as_the_reference_does(count: int, threshold: float, device: str) -> None:
    boxes, scores = draw(count, device)
    assert nms_match(boxes, scores, threshold) == reference.nms_match(boxes.cpu(), scores.cpu(), threshold)


def test_an_overlap_equal_to_the_threshold_is_kept_by_nms(device: str) -> None:
    """nms_match suppresses it."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]], device=device)
    scores = torch.tensor([0.5, 0.4], device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms_match(boxes, scores, 0.5) == [[0, 1]]


def test_boxes_of_no_size_suppress_nothing(device: str) -> None:
    boxes = torch.zeros(3, 4, device=device)
    assert nms(boxes, torch.tensor([0.1, 0.3, 0.2], device=device), 0.0).tolist() == [1, 2, 0]


def test_of_many_boxes_apart_all_are_kept_and_of_copies_one(device: str) -> None:
    count = 3000
    corner = 3 * torch.arange(count, device=device, dtype=torch.float32)[:, None]
    boxes = torch.cat([corner, corner, corner + 2, corner + 2], 1)
    scores = torch.linspace(0, 1, count, device=device)
    assert nms(boxes, scores, 0.5).tolist() == list(range(count))[::-1]
    assert nms(boxes[:1].expand(count, 4), scores, 0.5).tolist() == [count - 1]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, device: str) -> None:
    boxes, scores = draw(65, device, dtype)  # whole numbers, which every type can count
    assert nms(boxes, scores, 0.4).tolist() == nms(boxes.float(), scores, 0.4).tolist()
    dets, indices = soft_nms(boxes, scores)
    assert dets.dtype == dtype
    assert indices.tolist() == soft_nms(boxes.float(), scores)[1].tolist()


def test_boxes_may_be_columns_of_a_wider_tensor_and_need_a_gradient(device: str) -> None:
    boxes, scores = draw(65, device)
    dets = torch.cat([boxes, scores[:, None]], 1).requires_grad_()
    assert nms(dets[:, :4], dets[:, 4], 0.4).tolist() == nms(boxes, scores, 0.4).tolist()
    assert nms_match(dets[:, :4], dets[:, 4], 0.4) == nms_match(boxes, scores, 0.4)


def test_fake_tensors_have_as_many_boxes_as_it_takes() -> None:
    boxes, scores = draw(5)
    compiled = torch.compile(lambda b, s: nms(b, s, 0.4) + 1, fullgraph=True, backend='eager')
    assert compiled(boxes, scores).tolist() == (nms(boxes, scores, 0.4) + 1).tolist()
    with FakeTensorMode() as mode:
        fake = torch.ops.mmdcn.nms_match(mode.from_tensor(boxes), mode.from_tensor(scores), 0.4)
    assert fake.shape == (5,) and fake.dtype == torch.int64


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(boxes=torch.zeros(3, 5)), r'boxes must have shape \[N, 4\].* got shape \[3, 5\]'),
        (dict(boxes=torch.zeros(4)), r'boxes must have 2 dimensions'),
        (dict(boxes=torch.zeros(3, 4, dtype=torch.int64)), 'boxes must be of type float64.* got torch.int64'),
        (dict(scores=torch.zeros(2)), r'scores must have shape \[N\] = \[3\], got shape \[2\]'),
        (dict(scores=torch.zeros(3, device='meta')), 'scores must be on the device of boxes, cpu, got meta'),
        (dict(offset=2), 'offset must be 0 or 1, got 2'),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    arguments = dict(boxes=torch.zeros(3, 4), scores=torch.zeros(3), iou_threshold=0.5, offset=0) | change
    with pytest.raises(ValueError, match=message):
        nms(**arguments)


def test_a_method_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="method must be one of naive, linear, gaussian, got 'cubic'"):
        soft_nms(torch.zeros(1, 4), torch.zeros(1), method='cubic')
