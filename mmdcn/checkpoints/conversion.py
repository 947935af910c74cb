# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints of other implementations of deformable convolution.

In mmdcn, a layer with prefix P has `P.weight`, perhaps `P.bias`, and `P.conv_offset.{weight,bias}`. The latter predict
the offsets, (y, x) of each tap, and then, for DCNv2, the numbers whose sigmoids are the masks. `SOURCES` describes how
other projects differ.

Note: [What a state dict does not tell]
A state dict does not contain strides, paddings, dilations and groups: the model must have the same as the original.
`check_target` finds those that no layer of mmdcn can reproduce. Nor does a state dict contain the revision of the
project that trained it. The entries of `SOURCES` follow these revisions: 4uiiurz1's with a stride (an earlier one took
the whole pixel for a sample beyond the border), CharlesShang's with a sigmoid (the first had none), tvdcn's 1.1 with
its default activation of the masks, 2 * sigmoid (its softmax has no equivalent here).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdcn.checkpoints import layouts
from mmdcn.checkpoints.version1_keys import is_packed
from mmdcn.ops._arguments import pair


@dataclass(frozen=True)
class Source:
    """How a project names and interprets the parts of a deformable layer with prefix P.

    Attributes:
        offset: What follows P in the name of the convolution that predicts the offsets.
        conv: The same for the layer's own weight and bias.
        mask: The same for the convolution that predicts the masks; empty if `offset` predicts both, as in mmdcn.
        target: What follows P in the name of mmdcn's layer.
        mask_scale: The mask is this factor times the sigmoid.
        grouped: Whether each offset group is predicted from its own channels only.
        layout: The order of the offsets: one of `mmdcn.layouts.LAYOUTS`.
        dilated: Whether the convolution that predicts the offsets has the layer's dilation.
        same_size: Whether the output is as large as the input (apart from the stride) for any padding.
        rename: Returns mmdet's name of a key, or None for a key to drop.
    """

    offset: str
    conv: str = ''
    mask: str = ''
    target: str = ''
    mask_scale: float = 1.0
    grouped: bool = False
    layout: str = 'mmcv'
    dilated: bool = True
    same_size: bool = False
    rename: Callable[[str], str | None] | None = None

    @classmethod
    def torchvision(cls, conv: str, offset: str, mask: str = '') -> 'Source':
        """Describe a module that owns a `torchvision.ops.DeformConv2d` and the convolution that predicts its offsets.

        That convolution must have the kernel, stride, padding and dilation of the `DeformConv2d`, or a smaller kernel
        with the same centre. A state dict does not tell.

        Args:
            conv: The module's name for the `DeformConv2d`.
            offset: Its name for the convolution that predicts the offsets, or the offsets and then the masks.
            mask: Its name for the convolution whose sigmoid is the mask.
        """
        return cls(offset=f'.{offset}', conv=f'.{conv}', mask=mask and f'.{mask}', target=f'.{conv}')


def _detectron2_key(key: str) -> str | None:
    match = re.fullmatch(r'(backbone\.)?(?:bottom_up\.)?(?:stem|res([2-5])\.(\d+))\.(.+)', key)
    if match is None:
        return None
    root, stage, block, part = match.groups(default='')
    part = re.sub(r'^conv(\d)\.norm\.', r'bn\1.', part)
    part = re.sub(r'^shortcut\.norm\.', 'downsample.1.', part)
    part = re.sub(r'^shortcut\.', 'downsample.0.', part)
    return root + (f'layer{int(stage) - 1}.{block}.' if stage else '') + part


_VERSION1 = Source(offset='_offset')
_OFFSET_MASK = Source(offset='.conv_offset_mask', dilated=False)
SOURCES = {
    'mmcv': Source(offset='.conv_offset'),
    'mmcv-v1': _VERSION1,
    'mmdet-v1': _VERSION1,
    'detectron2': Source(offset='_offset', rename=_detectron2_key),  # only the backbone; the rest is dropped
    'charlesshang': _OFFSET_MASK,
    'chengdazhi': _OFFSET_MASK,
    'developer0hye': Source('.offset_conv', '.regular_conv', '.modulator_conv', mask_scale=2),
    'tvdcn': Source('.offset_generator', '', '.mask_generator', mask_scale=2, grouped=True),
    '4uiiurz1': Source('.p_conv', '.conv', '.m_conv', layout='4uiiurz1', dilated=False, same_size=True),
}


class Conversion(NamedTuple):
    """A converted state dict, and for each of its tensors the original keys that it comes from."""

    state_dict: dict[str, Tensor]
    origins: dict[str, tuple[str, ...]]


def convert_state_dict(state_dict: Mapping[str, Tensor], source: Source) -> Conversion:
    """Convert the deformable layers of a state dict to mmdcn's, and rename the other keys if they are detectron2's.

    If `check_target` passes, a layer of mmdcn with the converted parameters computes the same as the original, up to
    rounding. Its stride, padding, dilation and groups must be those of the original, except for 4uiiurz1: there a
    padding of 1 becomes (kernel_size - 1) / 2.

    Args:
        state_dict: Names and tensors.
        source: The project that they come from: an entry of `SOURCES`, or `Source.torchvision(…)`.

    Raises:
        ValueError: If there is no deformable layer of this source, or one of its layers cannot be converted.
    """
    keys = {(source.rename(key) if source.rename else key): key for key in state_dict}
    keys.pop(None, None)
    # With a dot before each name, a layer at the root has a prefix too: the empty one.
    tensors = {f'.{name}': state_dict[key] for name, key in keys.items()}
    origins: dict[str, tuple[str, ...]] = {f'.{name}': (key,) for name, key in keys.items()}
    prefixes = _prefixes(tensors, source)
    if not prefixes and not source.rename:
        raise ValueError(
            f'no layer of this source in the checkpoint: no key P{source.offset}.weight with a key '
            f'P{source.conv}.weight beside it; the keys begin with {", ".join(list(state_dict)[:3])}'
        )
    predictors = [part for part in (source.offset, source.mask) if part]
    for prefix in prefixes:
        names = [f'{part}.{kind}' for part in (source.conv, *predictors) for kind in ('weight', 'bias')]
        parts = {name: tensors.pop(prefix + name) for name in names if prefix + name in tensors}
        keys_of = {name: origins.pop(prefix + name) for name in parts}
        try:
            converted = _convert_layer(parts, source)
        except ValueError as error:
            raise ValueError(f'layer {prefix[1:] or "at the root"}: {error}') from error
        for name, tensor in converted.items():
            owner, kind = name.rsplit('.', 1)
            made_of = predictors if owner else [source.conv]
            tensors[prefix + source.target + name] = tensor
            origins[prefix + source.target + name] = sum((keys_of.get(f'{part}.{kind}', ()) for part in made_of), ())
    return Conversion(
        {name[1:]: tensor for name, tensor in tensors.items()}, {name[1:]: keys for name, keys in origins.items()}
    )


def check_target(state_dict: Mapping[str, Tensor], model: nn.Module, source: Source) -> None:
    """Check that a model with the converted weights computes the same as the original.

    Args:
        state_dict: The converted weights, as `convert_state_dict` gives them.
        model: The model that will load them.
        source: The project that they come from.

    Raises:
        ValueError: If a tensor has another shape in the model, or a layer computes something else: because of a
            dilation or a padding that the original cannot have, or because it has no bias but the checkpoint has one
            that is not zero. The message names all of them.
    """
    misfits = list(_misfits(state_dict, model, source))
    if misfits:
        raise ValueError(f'the model cannot do what the checkpoint was trained for: {"; ".join(misfits)}')


def _prefixes(tensors: Mapping[str, Tensor], source: Source) -> list[str]:
    offset = f'{source.offset}.weight'
    candidates = [name.removesuffix(offset) for name in tensors if name.endswith(offset)]
    return [prefix for prefix in candidates if f'{prefix}{source.conv}.weight' in tensors]


def _convert_layer(
    parts: dict[str, Tensor],  # by their names after the layer's prefix
    source: Source,
) -> dict[str, Tensor]:  # likewise
    weight = parts[f'{source.conv}.weight']  # [C_out, C_in/groups, kernel_h, kernel_w]
    kernel_size = (weight.shape[2], weight.shape[3])
    if source.mask:
        predict_weight, predict_bias = _join(parts, source, kernel_size)
        if f'{source.mask}.weight' in parts:
            weight = weight * source.mask_scale
    else:
        predict_weight, predict_bias = _pair_of(parts, source.offset)
    converted = {
        '.weight': weight,
        '.conv_offset.weight': _embed(predict_weight, kernel_size),
        '.conv_offset.bias': predict_bias,
    }
    if f'{source.conv}.bias' in parts:
        converted['.bias'] = parts[f'{source.conv}.bias']
    return converted


def _pair_of(parts: dict[str, Tensor], part: str) -> tuple[Tensor, Tensor]:  # weight and bias
    weight = parts[f'{part}.weight']
    return weight, parts.get(f'{part}.bias', weight.new_zeros(len(weight)))


def _join(
    parts: dict[str, Tensor], source: Source, kernel_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:  # [2*G*K or 3*G*K, C_in, h, w], [2*G*K or 3*G*K]
    """Merge the convolutions for offsets and masks into one; their numbers of groups may differ."""
    taps = math.prod(kernel_size)
    sizes = {source.offset: 2 * taps, source.mask: taps}  # channels per group
    predictors = {part: _pair_of(parts, part) for part in sizes if f'{part}.weight' in parts}
    for part, (weight, _) in predictors.items():
        if len(weight) % sizes[part]:
            raise ValueError(
                f'{part[1:]} has {len(weight)} channels; for a {kernel_size[0]}x{kernel_size[1]} kernel their number '
                f'must be a multiple of {sizes[part]}'
            )
    groups = {part: len(weight) // sizes[part] for part, (weight, _) in predictors.items()}
    deform_groups = math.lcm(*groups.values())
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for part, (weight, bias) in predictors.items():
        if source.grouped:
            weight = _ungroup(weight, groups[part])
        for tensor, joined in ((weight, weights), (bias, biases)):
            tensor = _repeat(tensor, groups[part], deform_groups)
            if part == source.offset:
                tensor = layouts.to_canonical(tensor, source.layout, kernel_size, deform_groups, dim=0)
            joined.append(tensor)
    return torch.cat(weights), torch.cat(biases)


def _ungroup(
    weight: Tensor,  # [groups*R, C/groups, kernel_h, kernel_w]
    groups: int,
) -> Tensor:  # [groups*R, C, kernel_h, kernel_w], which gives the same outputs in one group
    channels = weight.shape[1]
    blocks = [
        F.pad(block, (0, 0, 0, 0, group * channels, (groups - 1 - group) * channels))
        for group, block in enumerate(weight.chunk(groups))
    ]
    return torch.cat(blocks)


def _repeat(tensor: Tensor, groups: int, all_groups: int) -> Tensor:
    """Divide each group into smaller groups, each of which gets a copy of its channels, along dimension 0."""
    return tensor.unflatten(0, (groups, -1)).repeat_interleave(all_groups // groups, dim=0).flatten(0, 1)


def _embed(weight: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Pad a kernel with zeros to the size of the layer's kernel, around the same centre."""
    margins = [size - own for size, own in zip(kernel_size, weight.shape[2:], strict=True)]
    if any(margin < 0 or margin % 2 for margin in margins):
        raise ValueError(
            f'its offsets are predicted by a {"x".join(map(str, weight.shape[2:]))} kernel, but mmdcn uses the kernel '
            f'size of the layer for this, and no {"x".join(map(str, kernel_size))} kernel does the same'
        )
    y, x = (margin // 2 for margin in margins)
    return F.pad(weight, (x, x, y, y))


def _misfits(state_dict: Mapping[str, Tensor], model: nn.Module, source: Source) -> Iterator[str]:
    for name, tensor in model.state_dict().items():
        if name in state_dict and state_dict[name].shape != tensor.shape:
            yield f'{name} has shape {[*state_dict[name].shape]}, and in the model {[*tensor.shape]}'
    for name, layer in model.named_modules():
        if not is_packed(layer) or f'{name}.conv_offset.weight' not in state_dict:
            continue
        dilation, padding = pair(layer.dilation, 'dilation', 1), pair(layer.padding, 'padding', 0)
        if not source.dilated and dilation != (1, 1):
            yield f'{name} has dilation {dilation} in the model, but the original predicts its offsets without dilation'
        same = tuple((size - 1) // 2 for size in layer.kernel_size)
        if source.same_size and padding != same:
            yield (
                f'{name} has padding {padding} in the model; the original gives an output as large as its input for '
                f'any padding, and only its padding of 1 has the same taps and borders as mmdcn with {same}'
            )
        bias = state_dict.get(f'{name}.bias')
        if bias is not None and bias.any() and getattr(layer, 'bias', None) is None:
            yield f'{name}.bias is not zero, and the layer in the model has none'
