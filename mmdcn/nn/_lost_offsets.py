# SPDX-License-Identifier: Apache-2.0
"""Says so where a checkpoint has offsets for a layer under names that nothing loads."""

import logging
import warnings

from torch import Tensor


def report_lost_offsets(state_dict: dict[str, Tensor], prefix: str, unexpected_keys: list[str]) -> None:
    """Warn if a packed layer's offsets are not in what it loads, and yet there are keys that look like them.

    Args:
        state_dict: The keys beneath the layer's prefix.
        prefix: The layer's prefix, with its dot.
        unexpected_keys: What the modules above the layer had no use for.
    """
    layer = prefix[:-1]
    unused = [key for key in (*unexpected_keys, *state_dict) if key.startswith(layer) and 'offset' in key[len(layer) :]]
    if unused and f'{prefix}conv_offset.weight' not in state_dict:
        _warn(
            f'The offsets of {layer or "the layer"} are NOT loaded: the checkpoint has {", ".join(unused)} instead of '
            f'{prefix}conv_offset.*; call mmdcn.checkpoints.accept_version1_keys(model) before it loads, or convert '
            'the checkpoint with tools/model_converters/convert_checkpoint.py'
        )


def _warn(message: str) -> None:
    """Warn in mmengine's log where there is mmengine: a run keeps that."""
    try:
        from mmengine.logging import print_log
    except ImportError:
        warnings.warn(message, stacklevel=2)
    else:
        print_log(message, logger='current', level=logging.WARNING)
