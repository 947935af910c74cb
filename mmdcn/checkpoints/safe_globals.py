# SPDX-License-Identifier: Apache-2.0
"""The types besides tensors that `torch.load(weights_only=True)` may load from a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mmdcn._private_hooks import get_statistic

# These functions build numpy's arrays and scalars, and nothing else. numpy 1 stores them under other names.
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
    """Replace the `getattr` that looks up the methods of a history; this function finds nothing else."""
    return get_statistic(name)


MMENGINE = [*NUMPY, ConfigDict, HistoryBuffer, (_statistic, 'builtins.getattr')]


def allow_mmengine_checkpoints() -> None:
    """Let torch 2.6 and later resume from checkpoints with mmengine's objects while `weights_only` stays True.

    mmengine 0.10.7 stores the history of its log in checkpoints, but allows no type for loading. onedl-mmengine, its
    maintained fork, allows the history. But DeepSpeed loads its checkpoints itself, and they contain a
    mmengine.ConfigDict.
    """
    torch.serialization.add_safe_globals(MMENGINE)


def load_training(path: Path) -> dict[str, Any]:
    """Load a training checkpoint of mmengine, with the history of its log.

    Raises:
        pickle.UnpicklingError: If it contains anything else that is not data.
    """
    with torch.serialization.safe_globals(MMENGINE):
        return torch.load(path, map_location='cpu', weights_only=True)
