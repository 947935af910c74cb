# SPDX-License-Identifier: Apache-2.0
"""All private names of other packages that mmdcn uses, because no public name does the same.

If one of them disappears, `tests/test_private_hooks.py` fails and says what breaks. oneDNN's operators,
`torch.ops.mkldnn._…`, are not here, because the core also works without them (`mmdcn._extension`).
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import FrameType, ModuleType
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers as unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

# The private names, and what breaks without them.
HOOKS = {
    'sys._getframe': 'offsets that start at zero: Note [Offsets start at zero]',
    'torch._C._are_functorch_transforms_active': (
        'torch.func (grad, vmap, jacrev): nothing else tells whether a transform is active; it does not see through '
        'an operator and needs the autograd function instead'
    ),
    'torch.autograd.forward_ad._current_level': (
        'forward-mode derivatives: nothing else tells in time that there may be tangents, which an operator silently '
        'drops'
    ),
    'torch._C._is_any_autocast_enabled': (
        'the speed of small calls: the public function wants the name of a device, and takes 3 to 8 us to read it'
    ),
    'torch._C._get_fp32_precision_getter': (
        'the speed of small calls on CUDA: torch.backends.cudnn.conv.fp32_precision takes 3 to 5 us'
    ),
    'torch._C._any_requires_grad': 'the speed of small calls: a loop in Python takes 1 to 2 us',
    'torch._C._AutoDispatchBelowAutograd': (
        'the speed of small calls: without it, the derivative registered with torch.library adds about 0.3 ms of '
        'Python to each'
    ),
    'torch._C._FunctionBase.apply': (
        'the speed of small calls: Function.apply first binds the arguments to the signature, which takes longer than '
        'everything else'
    ),
    'torch._functorch.utils.unwrap_dead_wrappers': (
        'derivatives of what torch.func.vjp returns: its tensors outlive the transform, and their graph would be lost'
    ),
    'torch.utils._pytree.tree_leaves': 'SamplingRecorder for models that take their images in lists or dicts',
    'torch.utils._pytree.tree_map': 'AmpOptimWrapper on a CPU, which casts tensors in lists',
    'torch.utils._python_dispatch.TorchDispatchMode': 'the grids of feature maps, which follow from the operators',
    'torch._inductor.aoti_compile_and_package': 'export_aoti: torch documents it only under this name',
    'torch._inductor.aoti_load_package': 'mmdcn.deployment.load: torch documents it only under this name',
    'torch.cpu._is_avx2_supported': 'the choice of the CPU library if torch has no torch.cpu.get_capabilities',
    'torch.cpu._is_avx512_supported': 'the choice of the CPU library if torch has no torch.cpu.get_capabilities',
    'torch.nn.Module._apply': 'mmdcn.prepack: a layer that is moved or converted discards its packed weight there',
    'torch.Tensor._version': 'mmdcn.prepack: nothing else tells that a weight has changed',
    'torch.nn.Module._load_from_state_dict': (
        "loading checkpoints without mmcv's messages: mmcv's layers override it, and mmdcn's override theirs"
    ),
    'mmengine.analysis.complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS': (
        'get_model_complexity_info: it counts no FLOPs for deformable layers'
    ),
    'mmengine.analysis.complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS': (
        'get_model_complexity_info: it counts no activations for deformable layers'
    ),
    'mmengine._strategy.fsdp.FSDPStrategy._wrap_model': (
        'configs/_base_/strategies/fsdp.py: the whole package of the strategies is private'
    ),
    'mmengine.config.DictAction._parse_iterable': (
        "--cfg-options: mmdcn's also accept dicts, and read everything else as mmengine's do"
    ),
    'mmengine.logging.HistoryBuffer._set_default_statistics': (
        'resuming with weights_only: a history stores the methods of its statistics in _statistics_methods'
    ),
    'mmdet.apis.DetInferencer._load_model_from_metafile': 'DetInferencer with the model names of the zoo',
    'mmdet.apis.DetInferencer._get_transform_idx': 'DetInferencer with mmdcn.LoadImageFromFile on mmdet 3.3.0',
}


def is_transformed() -> bool:
    """Tell whether a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active()


def may_have_tangents() -> bool:
    """Tell whether the call is within a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_any_autocast_enabled() -> bool:
    """Tell whether autocast is on for any device."""
    return torch._C._is_any_autocast_enabled()


def convolution_precision() -> str:
    """Return the value of torch.backends.cudnn.conv.fp32_precision."""
    return torch._C._get_fp32_precision_getter('cuda', 'conv')


def any_requires_grad(*arguments: Any) -> bool:
    """Tell whether any of the arguments is a tensor that requires a gradient."""
    return torch._C._any_requires_grad(*arguments)


def below_autograd() -> AbstractContextManager[Any]:
    """Return a context in which an operator runs without its derivative being recorded."""
    return torch._C._AutoDispatchBelowAutograd()


def apply_quickly(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function without the overhead of `Function.apply`, outside all transforms."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def compile_package(exported: Any, path: str, metadata: dict[str, str]) -> None:
    """Compile an exported program with AOTInductor, and write it to a file with metadata."""
    settings = {'aot_inductor.metadata': metadata}
    torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=settings)


def load_package(path: str) -> Callable[..., Any]:
    """Load a file that `compile_package` has written."""
    return torch._inductor.aoti_load_package(path)


def has_avx2() -> bool:
    """Tell whether the processor has AVX2, according to an older torch."""
    return torch.cpu._is_avx2_supported()


def has_avx512() -> bool:
    """Tell whether the processor has AVX-512, according to an older torch."""
    return torch.cpu._is_avx512_supported()


def hooks_of_forward(module: torch.nn.Module) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    """Return the hooks of a module before and after its forward. They are no class's, so HOOKS cannot name them."""
    return module._forward_pre_hooks, module._forward_hooks


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
    """Read the value of a command-line option as mmengine's DictAction does."""
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
    """Tell whether a function of this name is anywhere on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None
