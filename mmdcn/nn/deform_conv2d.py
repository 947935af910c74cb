# SPDX-License-Identifier: Apache-2.0
"""The deformable convolutions as layers: mmcv's arguments, attributes and parameters, on mmdcn's operator."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdcn.nn._lost_offsets import report_lost_offsets
from mmdcn.nn._predictors import ConvPredictor, Predictor
from mmdcn.nn._tracing import OneNode
from mmdcn.ops import deform_conv2d
from mmdcn.ops._arguments import count, pair
from mmdcn.ops._autocast import without_autocast

Size = int | Sequence[int]  # one for both axes, or (y, x)


class _DeformConv(OneNode, nn.Module):
    """What the layers share.

    Raises:
        ValueError: If an argument is no integer, or too small, or channels do not divide by `groups`.
    """

    bias: nn.Parameter | None
    _predicted = 0  # channels that the layer predicts for each tap and offset group: (y, x), perhaps a mask

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size,
        dilation: Size,
        groups: int,
        deform_groups: int,
        bias: bool | str,
        deformable_groups: int | None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): a registered layer derives from mmcv's too, which comes next
        if deformable_groups is not None:
            warnings.warn('deformable_groups is now deform_groups', DeprecationWarning, stacklevel=3)
            deform_groups = deformable_groups
        self.in_channels = count(in_channels, 'in_channels', 1)
        self.out_channels = count(out_channels, 'out_channels', 1)
        self.kernel_size = pair(kernel_size, 'kernel_size', 1)
        self.stride = pair(stride, 'stride', 1)
        self.padding = pair(padding, 'padding', 0)
        self.dilation = pair(dilation, 'dilation', 1)
        self.groups = count(groups, 'groups', 1)
        self.deform_groups = count(deform_groups, 'deform_groups', 1)
        self.transposed, self.output_padding = False, (0,)  # as nn.Conv2d has them, for those who ask
        for name in ('in_channels', 'out_channels'):
            if getattr(self, name) % self.groups:
                raise ValueError(f'{name} must be a multiple of groups = {self.groups}, got {getattr(self, name)}')
        if self.in_channels % self.deform_groups:
            raise ValueError(
                f'in_channels must be a multiple of deform_groups = {self.deform_groups}, got {self.in_channels}'
            )
        self._add_parameters(bool(bias))
        self.reset_parameters()

    def _add_parameters(self, bias: bool) -> None:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter('bias', nn.Parameter(torch.empty(self.out_channels)) if bias else None)
        if self._predicted:
            channels = self._predicted * self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
            geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
            self.conv_offset = ConvPredictor(self.in_channels, channels, *geometry)

    def reset_parameters(self) -> None:
        """Draw the weight (Kaiming, fan-out), and set the bias and any predictor of offsets and masks to zero.

        So mmdet's backbones draw a convolution's weight, and so the taps start on the regular grid.
        """
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(conv_offset := getattr(self, 'conv_offset', None), Predictor):
            conv_offset.reset_parameters()

    def init_weights(self) -> None:
        """Do as `reset_parameters` does: this is the name that mmengine calls."""
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Return the arguments, as `nn.Conv2d` writes its own."""
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, groups={self.groups}, '
            f'deform_groups={self.deform_groups}, bias={self.bias is not None}'
        )

    __repr__ = nn.Module.__repr__  # mmcv's, which a registered layer would have, leaves out the parts

    def _check_groups(self, offset: Tensor) -> None:
        channels = 2 * self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        if offset.dim() == 4 and offset.shape[1] != channels:  # the operator tells of another rank
            raise ValueError(
                f'offset must have 2*G*K = {channels} channels, as the layer has deform_groups G = '
                f'{self.deform_groups}, got shape {list(offset.shape)}'
            )

    def _predict(self, x: Tensor) -> Tensor:
        """Predict offsets outside autocast: a place in a wide image has more digits than half precision."""
        with without_autocast(x):
            predicted: Tensor = self.conv_offset(x.to(self.conv_offset.weight.dtype))
        return predicted

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a layer; mmcv's own method announces each layer of each checkpoint, and loses the old keys."""
        self.is_init = True  # so that init_weights of mmengine's modules leaves what is loaded
        if self._predicted:
            report_lost_offsets(state_dict, prefix, unexpected_keys)
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class DeformConv2d(_DeformConv):
    """Deformable convolution (DCNv1) with offsets from outside (Dai et al., ICCV 2017, section 2.1).

    The arguments are those of `mmcv.ops.DeformConv2d`; K is the number of taps, G that of the offset groups.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel, one integer or (y, x), as all the sizes here.
        stride: Step between output positions in pixels, at least 1.
        padding: Zeros on each side in pixels, at least 0.
        dilation: Step between taps in pixels, at least 1.
        groups: Groups of the weight, which divide both numbers of channels.
        deform_groups: Groups G of input channels with offsets of their own.
        bias: Whether to add a bias; mmcv's layer cannot.
        im2col_step: Has no effect: there is no step to choose.
        deformable_groups: The old name of `deform_groups`.

    Raises:
        ValueError: If an argument is no integer, or too small, or channels do not divide by a number of groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = False,
        im2col_step: int = 32,
        *,
        deformable_groups: int | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *sizes, groups, deform_groups, bias, deformable_groups)
        self.im2col_step = im2col_step

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        offset: Tensor,  # [B, 2*G*K, H_out, W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Apply `mmdcn.ops.deform_conv2d` with the layer's weight."""
        self._check_groups(offset)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation)


class DeformConv2dPack(DeformConv2d):
    """Deformable convolution (DCNv1) in the place of a convolution: a `conv_offset` predicts the offsets.

    The arguments are those of `DeformConv2d`, the parameters those of `mmcv.ops.DeformConv2dPack`. The offsets are
    zero at first, so that the layer begins as a convolution (Dai et al., ICCV 2017, section 4).
    """

    _version = 2  # in a state dict's metadata, where mmcv's layer looks for it
    _predicted = 2

    def forward(  # type: ignore[override]  # as mmcv's: a packed layer takes the image alone
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Predict the offsets, and convolve with them."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with another weight and bias: mmcv's ConvModule folds a normalization into them."""
        return deform_conv2d(x, self._predict(x), weight, bias, self.stride, self.padding, self.dilation)


class ModulatedDeformConv2d(_DeformConv):
    """Modulated deformable convolution (DCNv2) with offsets and masks from outside (Zhu et al., CVPR 2019, 3.2).

    The arguments are those of `mmcv.ops.ModulatedDeformConv2d`, and mean what those of `DeformConv2d` do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
        *,
        deformable_groups: int | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *sizes, groups, deform_groups, bias, deformable_groups)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        offset: Tensor,  # [B, 2*G*K, H_out, W_out]
        mask: Tensor,  # [B, G*K, H_out, W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Apply `mmdcn.ops.deform_conv2d` with the layer's weight."""
        self._check_groups(offset)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """Modulated deformable convolution (DCNv2) in the place of a convolution: it predicts its offsets and masks.

    The arguments are those of `ModulatedDeformConv2d`, the parameters those of `mmcv.ops.ModulatedDeformConv2dPack`:
    of the 3*G*K channels of `conv_offset` the first 2*G*K are the offsets, (y, x) of each tap, and the sigmoid of the
    others is the mask. Offsets start at 0 and masks at 0.5 (Zhu et al., CVPR 2019, section 3.2).
    """

    _version = 2
    _predicted = 3

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
        offset, mask = self._predict(x).split((2 * taps, taps), dim=-3)
        return deform_conv2d(x, offset, weight, bias, self.stride, self.padding, self.dilation, mask.sigmoid())
