# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision training on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from mmengine import optim
from mmengine.device import get_device
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mmdcn._private_hooks import tree_map
from mmdcn.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(optim.AmpOptimWrapper):
    """mmengine's AmpOptimWrapper, which also trains on a CPU: in bfloat16, whose range needs no loss scaling.

    On a CPU, regions are extracted in float32, since bfloat16 would round their coordinates to 8 bits. mmcv's operators
    compute in float32 too, since they have no bfloat16 kernels for CPUs. A checkpoint from a CPU resumes on a GPU, and
    vice versa.

    Args:
        loss_scale: On a GPU as in mmengine; ignored on a CPU.
        dtype: On a GPU as in mmengine; ignored on a CPU, which uses bfloat16.
        use_fsdp: On a GPU as in mmengine; ignored on a CPU.
        kwargs: The arguments of mmengine's OptimWrapper.
    """

    def __init__(
        self,
        loss_scale: str | float | dict[str, Any] = 'dynamic',
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        self.on_cpu = get_device() == 'cpu'
        if not self.on_cpu:
            super().__init__(loss_scale, dtype, use_fsdp, **kwargs)
            return
        optim.OptimWrapper.__init__(self, **kwargs)  # mmengine's AmpOptimWrapper refuses a CPU
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', enabled=False)
        self.cast_dtype = torch.bfloat16
        _use_float32_in_mmcv()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, and on a GPU also that of the loss scaler."""
        state = super().state_dict()
        if self.on_cpu:
            del state['loss_scaler']  # it is empty, which a GPU would refuse to load
        return state

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Return a context that computes in mixed precision."""
        with super().optim_context(model):
            if not self.on_cpu:
                yield
                return
            with register_module_forward_pre_hook(_extract_regions_in_float32):  # type: ignore[arg-type]
                yield


def _extract_regions_in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Cast the inputs of RoI extraction to float32, since mmdet casts the regions to the type of the features."""
    return tree_map(_float32, args) if 'roi_layers' in module._modules else None


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@cache
def _use_float32_in_mmcv() -> None:
    """Make mmcv's operators cast their inputs to float32 under autocast on a CPU; nothing else changes."""
    import_module('mmcv.ops')
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith('mmcv.ops.'):
            forward = torch.amp.custom_fwd(function.forward, device_type='cpu', cast_inputs=torch.float32)
            function.forward = staticmethod(forward)  # type: ignore[method-assign]
