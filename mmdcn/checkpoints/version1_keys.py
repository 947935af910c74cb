# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from before mmcv's version 2, whose offsets lie beside the layer: `conv2_offset.*`, now inside it.

Note: [Version 1 keys]
mmcv renames `conv2_offset.weight` to `conv2.conv_offset.weight` where the layer `conv2` loads its parameters. That
came to nothing when torch began to hand each child module only the keys beneath its own prefix: the layer finds its
`conv_offset` missing, and its old key with its parent's unexpected ones. So the renaming is the parent's here, by a
hook that runs before it hands its keys on; and a layer under a parent without the hook says what is being lost.
"""

import logging
from typing import Any

import mmcv.ops
from mmengine.logging import print_log
from torch import Tensor, nn

PACKED_LAYERS = (mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack)  # and so mmdcn's


def accept_version1_keys(model: nn.Module) -> None:
    """Let a model load version-1 checkpoints, whichever of its modules is told to load.

    It holds for `load_state_dict`, for mmengine's `load_checkpoint`, and for `init_cfg=dict(type='Pretrained')`.
    `mmdcn.ResNet` and mmdcn's tools call it themselves. Other checkpoints load as before.

    Args:
        model: A model with packed deformable layers, mmdcn's or mmcv's.
    """
    for module in model.modules():
        if any(isinstance(child, PACKED_LAYERS) for child in module.children()):
            module.register_load_state_dict_pre_hook(_rename_version1_keys)


def _rename_version1_keys(parent: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, child in parent.named_children():
        for kind in ('weight', 'bias'):
            old, new = f'{prefix}{name}_offset.{kind}', f'{prefix}{name}.conv_offset.{kind}'
            if isinstance(child, PACKED_LAYERS) and old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)


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
        print_log(
            f'The offsets of {layer or "the layer"} are NOT loaded: the checkpoint has {", ".join(unused)} instead of '
            f'{prefix}conv_offset.*; convert it with tools/model_converters/convert_checkpoint.py',
            logger='current',
            level=logging.WARNING,
        )
