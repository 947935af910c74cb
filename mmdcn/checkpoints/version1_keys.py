# SPDX-License-Identifier: Apache-2.0
"""Loading version-1 checkpoints, which store a layer's offset weights beside it: `conv2_offset.*`.

Note: [Version 1 keys]
Since version 2 of mmcv's packed layers, these weights are inside the layer. mmcv renames `conv2_offset.weight` to
`conv2.conv_offset.weight` when the layer `conv2` loads its parameters. This stopped working when torch began to pass
each child module only the keys under its own prefix: the layer reports its `conv_offset` as missing, and its parent
reports the old key as unexpected. Therefore the parent renames the keys here, in a hook that runs before it passes its
keys on. A layer whose parent has no such hook warns about the offsets that are lost.
"""

from typing import Any

from torch import Tensor, nn


def accept_version1_keys(model: nn.Module) -> None:
    """Let a model and each of its modules load version-1 checkpoints.

    This works for `load_state_dict`, for mmengine's `load_checkpoint`, and for `init_cfg=dict(type='Pretrained')`.
    `mmdcn.ResNet` and mmdcn's tools call it themselves. Other checkpoints load as before.

    Args:
        model: A model with packed deformable layers, mmdcn's or mmcv's.
    """
    for module in model.modules():
        if any(is_packed(child) for child in module.children()):
            module.register_load_state_dict_pre_hook(_rename_version1_keys)


def is_packed(layer: nn.Module) -> bool:
    """Tell whether a layer (mmdcn's, mmcv's or another) predicts its own offsets, with a `conv_offset`."""
    return isinstance(getattr(layer, 'conv_offset', None), nn.Module) and hasattr(layer, 'deform_groups')


def _rename_version1_keys(parent: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, child in parent.named_children():
        for kind in ('weight', 'bias'):
            old, new = f'{prefix}{name}_offset.{kind}', f'{prefix}{name}.conv_offset.{kind}'
            if is_packed(child) and old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
