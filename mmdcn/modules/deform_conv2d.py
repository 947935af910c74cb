# SPDX-License-Identifier: Apache-2.0
"""The deformable convolutions as layers: mmcv's arguments, parameters and types, on mmdcn's operator.

Each layer is an instance of mmcv's class of the same name, because the ecosystem asks for that class: mmengine's
`dcn_offset_lr_mult` does, for one.
"""

from typing import Any

import mmcv.ops
import torch
from torch import Tensor, nn

from mmdcn.checkpoints.version1_keys import report_lost_offsets
from mmdcn.modules.predictors import Packed, Predictor
from mmdcn.modules.tracing import OneNode
from mmdcn.ops import deform_conv2d
from mmdcn.ops._autocast import without_autocast
from mmdcn.registry import MODELS


def _init_like_conv(weight: Tensor, bias: Tensor | None, conv_offset: nn.Conv2d | None) -> None:
    """Draw the weight as mmdet's backbones draw a convolution's, and let the taps start on the regular grid."""
    nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')
    if bias is not None:
        nn.init.zeros_(bias)
    if isinstance(conv_offset, Predictor):  # not yet, where mmcv's constructor calls this
        conv_offset.reset_parameters()


def _check_groups(layer: 'DeformConv2d | ModulatedDeformConv2d', offset: Tensor) -> None:
    channels = 2 * layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
    if offset.dim() == 4 and offset.shape[1] != channels:  # the operator tells of another rank
        raise ValueError(
            f'offset must have 2*G*K = {channels} channels, as the layer has deform_groups G = {layer.deform_groups}, '
            f'got shape {list(offset.shape)}'
        )


def _predict(conv_offset: nn.Conv2d, x: Tensor) -> Tensor:
    """Predict offsets outside autocast: a place in a wide image has more digits than half precision."""
    with without_autocast(x):
        return conv_offset(x.to(conv_offset.weight.dtype))


def _load_from_state_dict(
    self: Any,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load a layer; mmcv's own method announces each layer of each checkpoint, and loses the old keys."""
    self.is_init = True  # so that a parent's init_weights leaves what is loaded
    if hasattr(self, 'conv_offset'):
        report_lost_offsets(state_dict, prefix, unexpected_keys)
    nn.Module._load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    )


@MODELS.register_module()
class DeformConv2d(OneNode, mmcv.ops.DeformConv2d):
    """Deformable convolution (DCNv1) with offsets from outside.

    The arguments are those of `mmcv.ops.DeformConv2d`, `deformable_groups` as an old name of `deform_groups`
    included, and `bias` may be true. `im2col_step` has no effect: there is no step to choose.
    """

    bias: nn.Parameter | None

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter('bias', nn.Parameter(torch.empty(self.out_channels)) if bias else None)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weight (Kaiming, fan-out), and set the bias and any predictor of offsets to zero."""
        _init_like_conv(self.weight, self.bias, getattr(self, 'conv_offset', None))

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Apply `mmdcn.ops.deform_conv2d` with the layer's weight."""
        _check_groups(self, offset)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation)

    _load_from_state_dict = _load_from_state_dict

    def __repr__(self) -> str:
        return super().__repr__().replace('bias=False', f'bias={self.bias is not None}')


@MODELS.register_module(name=['DCN', 'DeformConv2dPack'])
class DeformConv2dPack(Packed, DeformConv2d, mmcv.ops.DeformConv2dPack):
    """Deformable convolution (DCNv1) in the place of a convolution: a `conv_offset` predicts the offsets.

    The arguments are those of `DeformConv2d`, the parameters those of `mmcv.ops.DeformConv2dPack`. The offsets are
    zero at first, so that the layer begins as a convolution (Dai et al., ICCV 2017, section 4).
    """

    def forward(  # type: ignore[override]  # as mmcv's: a packed layer takes the image alone
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Predict the offsets, and convolve with them."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with another weight and bias: mmcv's ConvModule folds a normalization into them."""
        offset = _predict(self.conv_offset, x)
        return deform_conv2d(x, offset, weight, bias, self.stride, self.padding, self.dilation)


@MODELS.register_module()
class ModulatedDeformConv2d(OneNode, mmcv.ops.ModulatedDeformConv2d):
    """Modulated deformable convolution (DCNv2) with offsets and masks from outside.

    The arguments are those of `mmcv.ops.ModulatedDeformConv2d`; any of them that has two axes may be a pair (y, x).
    """

    def init_weights(self) -> None:
        """Draw the weight (Kaiming, fan-out), and set the bias and any predictor of offsets and masks to zero."""
        _init_like_conv(self.weight, self.bias, getattr(self, 'conv_offset', None))

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        offset: Tensor,  # [B, 2*G*K, H_out, W_out]
        mask: Tensor,  # [B, G*K, H_out, W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Apply `mmdcn.ops.deform_conv2d` with the layer's weight."""
        _check_groups(self, offset)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    _load_from_state_dict = _load_from_state_dict


@MODELS.register_module(name=['DCNv2', 'ModulatedDCN', 'ModulatedDeformConv2dPack'])
class ModulatedDeformConv2dPack(Packed, ModulatedDeformConv2d, mmcv.ops.ModulatedDeformConv2dPack):
    """Modulated deformable convolution (DCNv2) in the place of a convolution: it predicts its offsets and masks.

    The arguments are those of `ModulatedDeformConv2d`, the parameters those of `mmcv.ops.ModulatedDeformConv2dPack`:
    of the 3*G*K channels of `conv_offset` the first 2*G*K are the offsets, (y, x) of each tap, and the sigmoid of the
    others is the mask. Offsets start at 0 and masks at 0.5 (Zhu et al., CVPR 2019, section 3.2).
    """

    def forward(  # type: ignore[override]  # as mmcv's: a packed layer takes the image alone
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Predict the offsets and masks, and convolve with them."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with another weight and bias: mmcv's ConvModule folds a normalization into them."""
        taps = self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        # From the end, since a convolution takes an image without a batch too, which the operator then refuses.
        offset, mask = _predict(self.conv_offset, x).split((2 * taps, taps), dim=-3)
        return deform_conv2d(x, offset, weight, bias, self.stride, self.padding, self.dilation, mask.sigmoid())
