# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of deformable RoI pooling: the levels of a feature pyramid, and the implementations."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from measure import Build, Call, compiled_mmcv_ops
from torch import Tensor

import mmdcn

PACKAGES = ('torch', 'mmdcn', 'onedl-mmcv', 'mmcv', 'torchvision')
BASELINE = 'roi_align'
WALL_GROUPS = ()


@dataclass(frozen=True)
class Case:
    """One level of a pyramid with 256 channels, for two images with 512 regions each on all levels together."""

    name: str
    height: int
    width: int
    rois: int
    smallest: int  # smallest side of a region, in pixels of the level
    dtype: torch.dtype = torch.float32


# Levels of an image of 800 x 1344 pixels. Regions of up to 112 pixels go to p2, of up to 224 pixels to p3, and so on.
LEVELS = (
    Case('p2', 200, 336, 600, 3),
    Case('p3', 100, 168, 250, 14),
    Case('p4', 50, 84, 120, 14),
    Case('p5', 25, 42, 54, 14),
)


def levels(name: str, **changes: Any) -> tuple[Case, ...]:
    return tuple(replace(level, name=f'{level.name} {name}', **changes) for level in LEVELS)


CASES = {
    'cpu': {'levels': LEVELS},
    'cuda': {'levels': levels('fp32'), 'fp16': levels('fp16', dtype=torch.float16)},
}


@dataclass
class Inputs:
    """The tensors of a case."""

    input: Tensor  # [2, 256, H, W]
    rois: Tensor  # [N, 5]
    offset: Tensor | None  # [N, 2, 7, 7], standard normal

    def channels_last(self) -> 'Inputs':
        return replace(self, input=self.input.contiguous(memory_format=torch.channels_last))


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    places = uniform(0, 1, case.rois, 2) * torch.tensor([case.width, case.height])
    halves = uniform(case.smallest / 2, 14, case.rois, 2)
    images = torch.arange(case.rois).remainder(2)[:, None]
    limit = torch.tensor([case.width, case.height]).repeat(2)
    corners = torch.cat([places - halves, places + halves], 1).clamp(min=0).minimum(limit)
    return Inputs(
        torch.randn(2, 256, case.height, case.width, generator=generator).to(device, case.dtype),
        torch.cat([images, corners], 1).to(device, case.dtype),
        torch.randn(case.rois, 2, 7, 7, generator=generator).to(device, case.dtype),
    )


def mmdcn_deform_roi_pool(x: Inputs) -> Tensor:
    return mmdcn.ops.deform_roi_pool(x.input, x.rois, x.offset, 7)


def mmdcn_without_offsets(x: Inputs) -> Tensor:
    return mmdcn.ops.deform_roi_pool(x.input, x.rois, None, 7)


def mmcv_deform_roi_pool(x: Inputs) -> Tensor:
    return compiled_mmcv_ops().deform_roi_pool(x.input, x.rois, x.offset, (7, 7))


def mmcv_roi_align(x: Inputs) -> Tensor:
    return compiled_mmcv_ops().roi_align(x.input, x.rois, (7, 7), 1.0, 0, 'avg', True)


@cache
def roi_align_on_mmdcn() -> ModuleType:
    """Return a second copy of mmcv's RoIAlign that runs on mmdcn's operators, as without a compiled mmcv."""
    from mmdcn.openmmlab import mmcv_ext

    origin = importlib.import_module('mmcv.ops.roi_align').__file__
    spec = importlib.util.spec_from_file_location('mmcv.ops.roi_align_on_mmdcn', origin)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ext_module = mmcv_ext
    return module


def mmcv_on_mmdcn(x: Inputs) -> Tensor:
    return roi_align_on_mmdcn().roi_align(x.input, x.rois, (7, 7), 1.0, 0, 'avg', True)


def torchvision_roi_align(x: Inputs) -> Tensor:
    from torchvision.ops import roi_align

    return roi_align(x.input, x.rois, 7, 1.0, -1, True)


def candidates_of(case: Case, device: str) -> dict[str, tuple[Callable[[Inputs], Tensor], Inputs]]:
    x = make_inputs(case, device)
    y = x.channels_last()
    return {
        'roi_align of mmcv': (mmcv_roi_align, x),
        'roi_align of torchvision': (torchvision_roi_align, x),
        'mmcv on mmdcn': (mmcv_on_mmdcn, x),
        'mmdcn without offsets': (mmdcn_without_offsets, x),
        'the same, channels_last': (mmdcn_without_offsets, y),
        'mmdcn': (mmdcn_deform_roi_pool, x),
        'mmdcn channels_last': (mmdcn_deform_roi_pool, y),
        'mmcv': (mmcv_deform_roi_pool, x),
    }


def forward_candidates(case: Case, device: str) -> dict[str, Build]:
    """Return, for each candidate, the function that builds its forward call."""
    return {name: partial(partial, *candidate) for name, candidate in candidates_of(case, device).items()}


def training_candidates(case: Case, device: str) -> dict[str, Build]:
    """Return the same for forward and backward, with the gradients of input and offsets."""
    return {name: partial(training_call, *candidate) for name, candidate in candidates_of(case, device).items()}


def training_call(function: Callable[[Inputs], Tensor], x: Inputs) -> Call:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    x = replace(x, input=leaf(x.input), offset=leaf(x.offset))
    grad_output = torch.ones_like(function(x))

    def call() -> list[Tensor | None]:
        output = function(x)
        return [output.detach(), *torch.autograd.grad(output, [x.input, x.offset], grad_output, allow_unused=True)]

    return call
