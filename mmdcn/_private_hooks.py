# SPDX-License-Identifier: Apache-2.0
"""Everything that mmdcn uses of others and that is not public, because nothing public does it.

`tests/test_private_hooks.py` fails on the day that one of them goes, with what breaks then. The operators of oneDNN,
`torch.ops.mkldnn._…`, are not here: the core does without them (`mmdcn._extension`).
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves as tree_leaves

# What is used, and what breaks without it.
HOOKS = {
    'sys._getframe': 'zero offsets at first: Note [Offsets start at zero]',
    'torch._C._are_functorch_transforms_active': (
        'torch.func (grad, vmap, jacrev): nothing else tells that a transform is at work, which does not see through '
        'an operator and needs the autograd function instead'
    ),
    'torch.autograd.forward_ad._current_level': (
        'forward-mode derivatives: nothing else tells in time that there may be tangents, which an operator drops '
        'without a word'
    ),
    'torch._C._AutoDispatchBelowAutograd': (
        'the speed of small calls: without it the derivative that torch.library has registered adds some 0.3 ms of '
        'Python to each'
    ),
    'torch._C._FunctionBase.apply': (
        'the speed of small calls: Function.apply first binds the arguments to the signature, which takes longer than '
        'all the rest'
    ),
    'torch.utils._pytree.tree_leaves': 'SamplingRecorder for models that take their images within lists or dicts',
    'torch.cpu._is_avx2_supported': 'the choice of the CPU library where torch has no torch.cpu.get_capabilities',
    'torch.cpu._is_avx512_supported': 'the choice of the CPU library where torch has no torch.cpu.get_capabilities',
    'torch.nn.Module._load_from_state_dict': (
        "the silence of a loaded checkpoint: mmcv's layers override it, and mmdcn's override theirs"
    ),
    'mmengine.analysis.complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS': (
        'get_model_complexity_info: a detector gets cheaper by each deformable layer'
    ),
    'mmengine.analysis.complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS': (
        'get_model_complexity_info: deformable layers have no activations'
    ),
    'mmengine._strategy.fsdp.FSDPStrategy._wrap_model': (
        'configs/_base_/strategies/fsdp.py: the package of the strategies is private as a whole'
    ),
    'mmengine.config.DictAction._parse_iterable': (
        "--cfg-options: mmdcn's, which know dicts, read all else as mmengine's do"
    ),
    'mmengine.logging.HistoryBuffer._set_default_statistics': (
        'resuming with weights_only: a history has the methods of its statistics in _statistics_methods'
    ),
    'mmdet.apis.DetInferencer._load_model_from_metafile': 'DetInferencer with the names of the zoo',
    'mmdet.apis.DetInferencer._get_transform_idx': 'DetInferencer with mmdcn.LoadImageFromFile on mmdet 3.3.0',
}


def is_transformed() -> bool:
    """Tell whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def may_have_tangents() -> bool:
    """Tell whether the call is within a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def below_autograd() -> AbstractContextManager[Any]:
    """Return a context in which an operator runs without its derivative being recorded."""
    return torch._C._AutoDispatchBelowAutograd()


def apply_quickly(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function outside all transforms."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def has_avx2() -> bool:
    """Ask an older torch about the processor."""
    return torch.cpu._is_avx2_supported()


def has_avx512() -> bool:
    """Ask an older torch about the processor."""
    return torch.cpu._is_avx512_supported()


def count_in_mmengine(operator: str, flops: Callable[..., int], activations: Callable[..., Any]) -> None:
    """Let `get_model_complexity_info` count an operator, named as in `mmdcn::deform_conv2d`."""
    from mmengine.analysis import complexity_analysis

    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[operator] = flops
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[operator] = activations


def mmengine_fsdp() -> ModuleType:
    """Return mmengine's module of the strategy that shards parameters."""
    from mmengine._strategy import fsdp

    return fsdp


def parse_option(text: str) -> Any:
    """Read the value of an option of a command line as mmengine's DictAction does."""
    from mmengine.config import DictAction

    return DictAction._parse_iterable(text)


def get_statistic(name: str) -> Callable[..., Any]:
    """Return a method of mmengine's HistoryBuffer by the name of its statistic.

    Raises:
        KeyError: If there is none of this name.
    """
    from mmengine.logging import HistoryBuffer

    return HistoryBuffer()._statistics_methods[name]


def is_within(function: str) -> bool:
    """Tell whether a function of this name has called, however far away."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None
