# SPDX-License-Identifier: Apache-2.0
"""A weight that is packed beforehand, for inference on a CPU."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from mmdcn.ops import pack_weight


@dataclass(frozen=True)
class PackedWeight:
    """The packed values of a weight, and what tells whether the weight has changed since."""

    weight: Tensor
    storage: Tensor  # keeps the address from being used again while `weight.data` is another tensor
    state: tuple[int, int | None]
    values: Tensor

    @staticmethod
    def of(weight: Tensor, groups: int) -> Optional['PackedWeight']:
        """Pack a weight; return None if that would not help, or if a later change could not be told."""
        if type(weight) is not nn.Parameter or weight.device.type != 'cpu':  # a DTensor, for example, has no address
            return None
        if weight.dtype not in (torch.float32, torch.float64):
            return None
        return PackedWeight(weight, weight.detach(), _state(weight), pack_weight(weight, groups))

    def values_of(self, weight: Tensor) -> Tensor | None:
        """Return the packed values if they are those of this weight.

        Compiled and exported programs get none: they outlive the weight and the processor.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        return self.values if weight is self.weight and _state(weight) == self.state else None


def _state(weight: Tensor) -> tuple[int, int | None]:
    """Return what changes with the weight: its address, and the version that torch counts, except in inference mode."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version
