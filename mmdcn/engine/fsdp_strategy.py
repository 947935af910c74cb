# SPDX-License-Identifier: Apache-2.0
"""A training strategy that shards the parameters over the processes."""

from typing import Any

import torch
from torch import nn

from mmdcn._private_hooks import mmengine_fsdp
from mmdcn.registry import STRATEGIES

fsdp: Any = mmengine_fsdp()


@STRATEGIES.register_module()
class FSDPStrategy(fsdp.FSDPStrategy):
    """mmengine's FSDPStrategy, which can also resume a run and train on CPUs.

    The arguments are those of `mmengine.FSDPStrategy`; `configs/_base_/strategies/fsdp.py` sets them.
    """

    model_wrapper: dict[str, Any] | None

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not torch.cuda.is_available():
            self.model_wrapper = dict(self.model_wrapper or {}, device_id='cpu')
        return super()._wrap_model(model)

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state; mmengine passes the arguments to torch in the order of an older version."""
        optimizer = self.optim_wrapper.optimizer
        state_dict = fsdp.FSDP.optim_state_dict_to_load(self.model, optimizer, optim_state_dict=state_dict)
        self.optim_wrapper.load_state_dict(state_dict)
