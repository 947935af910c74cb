# SPDX-License-Identifier: Apache-2.0
"""The types that autocast gives to an operator's arguments, and a context without autocast."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mmdcn._private_hooks import is_any_autocast_enabled


@torch.compiler.assume_constant_result  # torch.compile of torch 2.10 cannot trace this
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast; on a device that has no autocast, such as meta, it does nothing."""
    # A graph that is captured without autocast may run under it. In eager mode, torch.autocast would take 12 us.
    if not (is_any_autocast_enabled() or torch.compiler.is_compiling()):
        return nullcontext()
    device = x.device.type
    return torch.autocast(device, enabled=False) if _knows_autocast(device) else nullcontext()


def autocast(values: Sequence[Any], places: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Cast values, the input first, to autocast's type, and `places` (offsets, masks, regions) to float32."""
    if not is_any_autocast_enabled():
        return values, places
    device = values[0].device.type if isinstance(values[0], Tensor) else ''
    if not (device and _knows_autocast(device) and torch.is_autocast_enabled(device)):
        return values, places

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype not in (torch.float64, dtype):
            return tensor.to(dtype)
        return tensor  # float64 keeps its type, as under torch's own rules

    low = torch.get_autocast_dtype(device)
    return [cast(value, low) for value in values], [cast(place, torch.float32) for place in places]
