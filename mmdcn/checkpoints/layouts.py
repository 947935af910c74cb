# SPDX-License-Identifier: Apache-2.0
"""The channel layouts of offset tensors, and conversions between them.

The canonical layout is that of mmcv, torchvision, detectron2 and ONNX. For offset group g and tap k, offset channel
`(g*K + k)*2` is y, the next one is x, and mask channel `g*K + k` is the mask. Taps are numbered row by row. Other
projects have other layouts:

| layout      | offsets                                  | taps             |
|-------------|------------------------------------------|------------------|
| `mmcv`      | (y, x) of each tap                       | row by row       |
| `4uiiurz1`  | y of all taps, then x of all taps        | row by row       |
| `mindspore` | x of all taps, then y of all taps        | row by row       |
| `dcnv3`     | (x, y) of each tap                       | column by column |

In all of them the masks, if there are any, follow the offsets. The functions permute channels and change no value: the
offsets of DCNv3 must still be multiplied by its `offset_scale`, and its masks still need their softmax.

Sources: `deform_conv_v2.py` of 4uiiurz1/pytorch-deform-conv-v2; MindSpore's page on `ops.deformable_conv2d`, and mmcv's
code for Ascend; the sampling grid of DCNv3 in OpenGVLab/InternImage.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Each view rearranges the channel indices of its layout into the canonical order: offsets [2*G*K] into
# [G, kernel_h, kernel_w, 2] (y, x), and masks [G*K] into [G, kernel_h, kernel_w], or into shapes that flatten to these.
_View = Callable[[Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]]
_VIEWS: dict[str, _View] = {
    'mmcv': lambda offsets, masks, groups, height, width: (offsets, masks),
    '4uiiurz1': lambda offsets, masks, groups, height, width: (offsets.view(2, -1).T, masks),
    'mindspore': lambda offsets, masks, groups, height, width: (offsets.view(2, -1).T.flip(1), masks),
    'dcnv3': lambda offsets, masks, groups, height, width: (
        offsets.view(groups, width, height, 2).transpose(1, 2).flip(3),
        masks.view(groups, width, height).transpose(1, 2),
    ),
}
LAYOUTS = tuple(_VIEWS)


def to_canonical(
    tensor: Tensor,  # 2*G*K or 3*G*K channels along dim
    layout: str,
    kernel_size: tuple[int, int],
    deform_groups: int = 1,
    dim: int = 1,
) -> Tensor:  # as tensor
    """Reorder channels of another layout into the canonical layout.

    It works for the offsets themselves ([B, 2*G*K, H_out, W_out], `dim=1`; NHWC, `dim=-1`), and for the weight
    ([2*G*K, C_in, kernel_h, kernel_w]) and the bias ([2*G*K]) that predict them (`dim=0`).

    Args:
        tensor: The offsets, or the offsets and then the masks; or the parameters that predict them.
        layout: The layout of the channels: one of `LAYOUTS`.
        kernel_size: (height, width) of the kernel, K taps in all.
        deform_groups: The number G of offset groups.
        dim: The dimension of the channels.

    Returns:
        The same values in the canonical layout. `from_canonical` restores `tensor`, bit for bit.

    Raises:
        ValueError: If the layout is unknown, or the number of channels is neither 2*G*K nor 3*G*K.
    """
    return tensor.index_select(dim, _order(tensor, layout, kernel_size, deform_groups, dim))


def from_canonical(
    tensor: Tensor,  # 2*G*K or 3*G*K channels along dim
    layout: str,
    kernel_size: tuple[int, int],
    deform_groups: int = 1,
    dim: int = 1,
) -> Tensor:  # as tensor
    """Reorder canonical channels into another layout: the inverse of `to_canonical`, with the same arguments."""
    return tensor.index_select(dim, _order(tensor, layout, kernel_size, deform_groups, dim).argsort())


def _order(
    tensor: Tensor, layout: str, kernel_size: tuple[int, int], deform_groups: int, dim: int
) -> Tensor:  # [channels], whose entry c is the index of the canonical channel c in the layout
    if layout not in _VIEWS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    planes = deform_groups * kernel_size[0] * kernel_size[1]
    channels = tensor.shape[dim]
    if channels not in (2 * planes, 3 * planes):
        raise ValueError(
            f'{kernel_size[0]}x{kernel_size[1]} taps in {deform_groups} offset groups have {2 * planes} channels of '
            f'offsets, or {3 * planes} with masks; dimension {dim} of the tensor has {channels}'
        )
    numbers = torch.arange(3 * planes, device=tensor.device)
    offsets, masks = _VIEWS[layout](numbers[: 2 * planes], numbers[2 * planes :], deform_groups, *kernel_size)
    return torch.cat([offsets.flatten(), masks.flatten()])[:channels]
