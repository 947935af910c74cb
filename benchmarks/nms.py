# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of non-maximum suppression, and the implementations of mmdcn, mmcv and torchvision."""

from dataclasses import dataclass
from functools import partial

import torch
from measure import Build, compiled_mmcv_ops
from torch import Tensor

import mmdcn

PACKAGES = ('torch', 'mmdcn', 'onedl-mmcv', 'mmcv', 'torchvision')
BASELINE = 'nms of mmcv'
WALL_GROUPS = ()


@dataclass(frozen=True)
class Case:
    """A number of boxes around a number of objects, in an image of 800 x 1344 pixels."""

    name: str
    count: int
    objects: int


BOXES = (Case('2,000 of 20 objects', 2000, 20), Case('2,000 apart', 2000, 2000), Case('8,000 of 80', 8000, 80))
CASES = {device: {'boxes': BOXES} for device in ('cpu', 'cuda')}


def draw(case: Case, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    objects = torch.rand(case.objects, 2, generator=generator) * torch.tensor([1344.0, 800.0])
    middles = objects.repeat(case.count // case.objects, 1) + 10 * normal(case.count, 2)
    halves = 40 * (0.3 * normal(case.count, 2)).exp()
    scores = torch.rand(case.count, generator=generator)
    return torch.cat([middles - halves, middles + halves], 1).to(device), scores.to(device)


def mmdcn_nms(boxes: Tensor, scores: Tensor) -> Tensor:
    return mmdcn.ops.nms(boxes, scores, 0.7)


def mmcv_nms(boxes: Tensor, scores: Tensor) -> Tensor:
    return compiled_mmcv_ops().nms(boxes, scores, 0.7)[1]


def torchvision_nms(boxes: Tensor, scores: Tensor) -> Tensor:
    from torchvision.ops import nms

    return nms(boxes, scores, 0.7)


def forward_candidates(case: Case, device: str) -> dict[str, Build]:
    """Return, for each candidate, the function that builds its forward call."""
    arguments = draw(case, device)
    functions = {'nms of mmcv': mmcv_nms, 'nms of torchvision': torchvision_nms, 'mmdcn': mmdcn_nms}
    return {name: partial(partial, function, *arguments) for name, function in functions.items()}
