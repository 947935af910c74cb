# SPDX-License-Identifier: Apache-2.0
"""A warning about checkpoints that store a layer's offset weights under keys that nothing loads."""

import logging
import warnings

from torch import Tensor


def report_lost_offsets(state_dict: dict[str, Tensor], prefix: str, unexpected_keys: list[str]) -> None:
    """Warn if a packed layer's offset weights are missing, but the checkpoint has keys that look like them.

    Args:
        state_dict: The part of the checkpoint whose keys begin with the layer's prefix.
        prefix: The layer's prefix, including the dot at its end.
        unexpected_keys: The keys that the modules above the layer did not use.
    """
    layer = prefix[:-1]
    beside = (f'{layer}.', f'{layer}_') if layer else ''  # conv1's keys, not conv10's
    keys = (*unexpected_keys, *state_dict)
    unused = [key for key in keys if key.startswith(beside) and 'offset' in key[len(layer) :]]
    # The weight itself may have another name, as with weight normalization.
    if unused and not any(key.startswith(f'{prefix}conv_offset.') for key in state_dict):
        _warn(
            f'The offsets of {layer or "the layer"} are NOT loaded: the checkpoint has {", ".join(unused)} instead of '
            f'{prefix}conv_offset.*; call mmdcn.checkpoints.accept_version1_keys(model) before loading, or convert '
            'the checkpoint with tools/model_converters/convert_checkpoint.py'
        )


def _warn(message: str) -> None:
    """Warn in mmengine's log if mmengine is installed, because a training run saves that log."""
    try:
        from mmengine.logging import print_log
    except ImportError:
        warnings.warn(message, stacklevel=2)
    else:
        print_log(message, logger='current', level=logging.WARNING)
