# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from before mmcv's version 2, whose offsets lie beside the layer: `conv2_offset.*`, now inside it.

Note: [Version 1 keys]
mmcv renames `conv2_offset.weight` to `conv2.conv_offset.weight` where the layer `conv2` loads its parameters. That
came to nothing when torch began to hand each child module only the keys beneath its own prefix: the layer finds its
`conv_offset` missing, and its old key with its parent's unexpected ones. So the renaming is the parent's here, by a
hook that runs before it hands its keys on; and a layer under a parent without the hook says what is being lost.
"""

from typing import Any

from torch import Tensor, nn


def accept_version1_keys(model: nn.Module) -> None:
    """Let a model load version-1 checkpoints, whichever of its modules is told to load.

    It holds for `load_state_dict`, for mmengine's `load_checkpoint`, and for `init_cfg=dict(type='Pretrained')`.
    `mmdcn.ResNet` and mmdcn's tools call it themselves. Other checkpoints load as before.

    Args:
        model: A model with packed deformable layers, mmdcn's or mmcv's.
    """
    for module in model.modules():
        if any(is_packed(child) for child in module.children()):
            module.register_load_state_dict_pre_hook(_rename_version1_keys)


def is_packed(layer: nn.Module) -> bool:
    """Tell whether a layer predicts its offsets itself, mmdcn's or mmcv's or another: by a `conv_offset`."""
    return isinstance(getattr(layer, 'conv_offset', None), nn.Module) and hasattr(layer, 'deform_groups')


def _rename_version1_keys(parent: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, child in parent.named_children():
        for kind in ('weight', 'bias'):
            old, new = f'{prefix}{name}_offset.{kind}', f'{prefix}{name}.conv_offset.{kind}'
            if is_packed(child) and old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
