# SPDX-License-Identifier: Apache-2.0
"""What may lie beside the weights in a checkpoint that `torch.load(weights_only=True)` reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mmdcn._private_hooks import get_statistic

# numpy's arrays and scalars are made by these, which make nothing else. numpy 1 had them under another name.
ARRAY, SCALAR = (value.__reduce__()[0] for value in (np.zeros(0), np.float64(0)))
NUMPY = [
    ARRAY,
    (ARRAY, 'numpy.core.multiarray._reconstruct'),
    SCALAR,
    (SCALAR, 'numpy.core.multiarray.scalar'),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'},
]


def _statistic(_: type[HistoryBuffer], name: str) -> Callable[..., Any]:
    """Stand for the `getattr` that gives a history its methods, and gives no other thing."""
    return get_statistic(name)


MMENGINE = [*NUMPY, ConfigDict, HistoryBuffer, (_statistic, 'builtins.getattr')]


def allow_mmengine_checkpoints() -> None:
    """Let torch 2.6 and later resume from checkpoints that hold mmengine's objects, with `weights_only` True as ever.

    mmengine 0.10.7 keeps the history of its log in them and allows for nothing. onedl-mmengine, its maintained fork,
    allows for that; but DeepSpeed loads its checkpoints itself, and they hold its settings, an mmengine.ConfigDict.
    """
    torch.serialization.add_safe_globals(MMENGINE)


def load_training(path: Path) -> dict[str, Any]:
    """Load a checkpoint of a training by mmengine, the history of its log included.

    Raises:
        pickle.UnpicklingError: If it holds anything else that is not data.
    """
    with torch.serialization.safe_globals(MMENGINE):
        return torch.load(path, map_location='cpu', weights_only=True)
