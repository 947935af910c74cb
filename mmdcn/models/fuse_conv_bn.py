# SPDX-License-Identifier: Apache-2.0
"""Folding batch normalizations into the convolutions before them, plain or deformable, for inference."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.wrappers import Conv2d
from mmengine.logging import print_log
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmdcn import modules
from mmdcn._private_hooks import hooks_of_forward

_TAKEN_APART: tuple[type[nn.Module], ...] = ()
with suppress(ImportError):  # mmdet is optional
    from mmdet.models.dense_heads.tood_head import TaskDecomposition

    _TAKEN_APART = (TaskDecomposition,)

# Their outputs are linear in weight and bias. A subclass may differ: mmcv's ConvWS2d is not linear in its weight.
_CONVS = {
    nn.Conv2d,
    Conv2d,
    Conv2dAdaptivePadding,
    modules.DeformConv2d,
    modules.DeformConv2dPack,
    modules.ModulatedDeformConv2d,
    modules.ModulatedDeformConv2dPack,
}
_NORMS = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fold each batch normalization into the convolution that feeds it, plain or deformable.

    Up to rounding, the fused model computes the same as the model in eval mode: a deformable convolution, too, is
    linear in its weight and bias. The fused model is not for training.

    mmcv's function of this name guesses from the order of definition which convolution feeds a normalization. This one
    traces the forward of the module that contains them (by `torch.fx`, with its default arguments). It fuses a pair if
    the convolution's output goes into the normalization and nowhere else, and if each of them is called once. A
    convolution with several normalizations, as in RTMDet, becomes one convolution for each of them.

    A module whose forward cannot be traced stays as it is, and a warning names it and the reason. A convolution whose
    weight is computed (weight standardization, spectral norm) stays as it is, too. So does TOOD's `TaskDecomposition`,
    which takes the parts of a `ConvModule` out of it.

    Args:
        model: A detector, or any module. It is changed in place; `nn.Identity` replaces each fused normalization.

    Returns:
        The model.
    """
    for name, module in _holders_of_norms(model, ''):
        for conv_name, norm_name in _pairs(name, module):
            fused = _fuse(module.get_submodule(conv_name), module.get_submodule(norm_name))
            module.set_submodule(conv_name, fused)
            module.set_submodule(norm_name, nn.Identity())
    return model


def _fuse(conv: Any, norm: Any) -> nn.Module:
    fused = deepcopy(conv)  # another module may share the convolution
    fused.weight, fused.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return fused


class _Tracer(fx.Tracer):
    """Trace the forward of one module; each module that it calls is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.args[1:] == ('requires_grad',):  # for activation checkpointing; false in inference
            return False
        return super().to_bool(obj)


def _holders_of_norms(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _TAKEN_APART):
        return
    if any(type(part).forward in _NORMS for part in _parts(module)):
        yield name, module
    for child_name, child in module.named_children():
        yield from _holders_of_norms(child, f'{name}.{child_name}' if name else child_name)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child


def _pairs(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of each convolution and normalization if the latter alone takes the former's output."""
    defaults = {
        name: parameter.default
        for name, parameter in signature(module.forward).parameters.items()
        if parameter.default is not Parameter.empty
    }
    try:
        nodes = list(_Tracer().trace(module, concrete_args=defaults).nodes)
    except Exception as error:  # a forward can fail in any way if its input is not a tensor
        print_log(
            f'The normalizations of {name or "the model"} ({type(module).__name__}) are not fused: its forward cannot '
            f'be traced: {type(error).__name__}: {error}',
            logger='current',
            level=logging.WARNING,
        )
        return
    uses = Counter(node.target for node in nodes if node.op == 'call_module')
    uses.update(str(node.target).rpartition('.')[0] for node in nodes if node.op == 'get_attr')
    names = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    parts = {node: module.get_submodule(str(node.target)) for node in nodes if node.op == 'call_module'}
    once = {node: part for node, part in parts.items() if uses[node.target] == names[part] == 1}
    for source, conv in once.items():
        user, *others = source.users
        if not others and user in once and _can_fuse(conv, once[user]):
            yield str(source.target), str(user.target)


def _can_fuse(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) in _CONVS
        and isinstance(conv.weight, nn.Parameter)  # else a hook computes it
        and type(norm).forward in _NORMS
        and norm.running_mean is not None
        and not (hooks_of_forward(conv)[1] or any(hooks_of_forward(norm)))
    )
