# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on a CPU."""

from typing import Any

import torch
from mmengine import optim
from mmengine.device import get_device

from mmdcn.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(optim.AmpOptimWrapper):
    """mmengine's AmpOptimWrapper, which also trains on a CPU: in bfloat16, whose range needs no scale of the loss.

    Args:
        loss_scale: On a GPU as mmengine has it; without effect on a CPU.
        dtype: On a GPU as mmengine has it; on a CPU bfloat16, whatever is given.
        use_fsdp: Likewise.
        kwargs: mmengine's arguments of an OptimWrapper.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        if get_device() != 'cpu':
            super().__init__(loss_scale, dtype, use_fsdp, **kwargs)
            return
        optim.OptimWrapper.__init__(self, **kwargs)  # mmengine's AmpOptimWrapper refuses a CPU
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', enabled=False)
        self.cast_dtype = torch.bfloat16

    def state_dict(self) -> dict:
        """Give the optimizer's state, and that of the loss's scale where there is one: a GPU would refuse none."""
        state = super().state_dict()
        if not self.loss_scaler.is_enabled():
            del state['loss_scaler']
        return state
