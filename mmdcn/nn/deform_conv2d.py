# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution layers with mmcv's arguments, attributes and parameters, on mmdcn's operator."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdcn.nn._lost_offsets import report_lost_offsets
from mmdcn.nn._packed_weight import PackedWeight
from mmdcn.nn._predictors import ConvPredictor, Predictor
from mmdcn.nn._tracing import OneNode
from mmdcn.ops import deform_conv2d
from mmdcn.ops._arguments import count, pair
from mmdcn.ops._autocast import without_autocast

Size = int | Sequence[int]  # one for both axes, or (y, x)


class _DeformConv(OneNode, nn.Module):
    """Base class of the deformable convolutions.

    Raises:
        ValueError: If an argument is not an integer, or too small, or a number of groups does not divide the channels.
    """

    bias: nn.Parameter | None
    _packed_weight: PackedWeight | None = None  # for inference, if `mmdcn.prepack` was called
    _predicted = 0  # channels that the layer predicts per tap and offset group: y, x and perhaps a mask

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
        nn.Module.__init__(self)  # not super(): in a registered layer, the next base is mmcv's layer
        if deformable_groups is not None:
            warnings.warn('deformable_groups is deprecated: use deform_groups', DeprecationWarning, stacklevel=3)
            deform_groups = deformable_groups
        self.in_channels = count(in_channels, 'in_channels', 1)
        self.out_channels = count(out_channels, 'out_channels', 1)
        self.kernel_size = pair(kernel_size, 'kernel_size', 1)
        self.stride = pair(stride, 'stride', 1)
        self.padding = pair(padding, 'padding', 0)
        self.dilation = pair(dilation, 'dilation', 1)
        self.groups = count(groups, 'groups', 1)
        self.deform_groups = count(deform_groups, 'deform_groups', 1)
        self.transposed, self.output_padding = False, (0,)  # as in nn.Conv2d, for code that reads them
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

        mmdet's backbones draw the weight of a convolution in the same way. With zero offsets, the taps start on the
        regular grid.
        """
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(conv_offset := getattr(self, 'conv_offset', None), Predictor):
            conv_offset.reset_parameters()

    def init_weights(self) -> None:
        """Reset the parameters; mmengine calls this method."""
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Return the arguments in the style of `nn.Conv2d`."""
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, groups={self.groups}, '
            f'deform_groups={self.deform_groups}, bias={self.bias is not None}'
        )

    __repr__ = nn.Module.__repr__  # a registered layer would inherit mmcv's, which omits the submodules

    def _check_groups(self, offset: Tensor) -> None:
        channels = 2 * self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        if offset.dim() == 4 and offset.shape[1] != channels:  # the operator reports a wrong rank
            raise ValueError(
                f'offset must have 2*G*K = {channels} channels, as the layer has deform_groups G = '
                f'{self.deform_groups}, got shape {list(offset.shape)}'
            )

    def _predict(self, x: Tensor) -> Tensor:
        """Predict offsets outside autocast: half precision cannot resolve positions in a wide image."""
        weight = getattr(self.conv_offset, 'weight', None)
        if weight is None:  # another module than a convolution
            weight = next(self.conv_offset.parameters(), x)
        with without_autocast(x):
            predicted: Tensor = self.conv_offset(x.to(weight.dtype))
        return predicted

    def _convolve(
        self, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation)
        if self._packed_weight is not None and weight.requires_grad and torch.is_grad_enabled():
            self._packed_weight = None  # a fused optimizer changes the weight without counting a version
        packed_weight = None if self._packed_weight is None else self._packed_weight.values_of(weight)
        return deform_conv2d(x, offset, weight, bias, *geometry, mask, packed_weight=packed_weight)

    def train(self, mode: bool = True) -> '_DeformConv':
        """Set the mode; training mode discards the packed weight."""
        if mode:
            self._packed_weight = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> '_DeformConv':
        self._packed_weight = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_packed_weight': None}

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
        """Load the layer without mmcv's method, which logs a message for each layer and loses version-1 keys."""
        self._packed_weight = None
        self.is_init = True  # keeps mmengine's init_weights from overwriting the loaded parameters
        if self._predicted:
            report_lost_offsets(state_dict, prefix, unexpected_keys)
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class DeformConv2d(_DeformConv):
    """Deformable convolution (DCNv1) that takes its offsets as an input (Dai et al., ICCV 2017, section 2.1).

    The arguments are those of `mmcv.ops.DeformConv2d`. K is the number of taps, G the number of offset groups.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel; like all sizes here, one integer or (y, x).
        stride: Step between output positions in pixels, at least 1.
        padding: Zeros on each side in pixels, at least 0.
        dilation: Step between taps in pixels, at least 1.
        groups: Number of groups of the weight; it must divide both numbers of channels.
        deform_groups: Number G of offset groups: groups of input channels with their own offsets.
        bias: Whether to add a bias, which mmcv's layer cannot do.
        im2col_step: Has no effect; it exists for compatibility with mmcv.
        deformable_groups: Deprecated name of `deform_groups`.

    Raises:
        ValueError: If an argument is not an integer, or too small, or a number of groups does not divide the channels.
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
        return self._convolve(x, offset, self.weight, self.bias)


class DeformConv2dPack(DeformConv2d):
    """Deformable convolution (DCNv1) that replaces a convolution: its `conv_offset` predicts the offsets.

    The arguments are those of `DeformConv2d`, the parameters those of `mmcv.ops.DeformConv2dPack`. The offsets start
    at zero, so that the layer starts as a plain convolution (Dai et al., ICCV 2017, section 4).
    """

    _version = 2  # stored in the metadata of a state dict, where mmcv's layer reads it
    _predicted = 2

    def forward(  # type: ignore[override]  # as in mmcv: a packed layer takes only the image
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Predict the offsets, and convolve with them."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with the given weight and bias, into which mmcv's ConvModule may have folded a normalization."""
        return self._convolve(x, self._predict(x), weight, bias)


class ModulatedDeformConv2d(_DeformConv):
    """Modulated deformable convolution (DCNv2) that takes offsets and masks as inputs (Zhu et al., CVPR 2019, 3.2).

    The arguments are those of `mmcv.ops.ModulatedDeformConv2d`; `DeformConv2d` describes them.
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
        return self._convolve(x, offset, self.weight, self.bias, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """Modulated deformable convolution (DCNv2) that replaces a convolution and predicts its own offsets and masks.

    The arguments are those of `ModulatedDeformConv2d`, the parameters those of `mmcv.ops.ModulatedDeformConv2dPack`.
    `conv_offset` has 3*G*K channels: the first 2*G*K are the offsets, (y, x) of each tap, and the sigmoid of the others
    is the mask. Offsets start at 0 and masks at 0.5 (Zhu et al., CVPR 2019, section 3.2).
    """

    _version = 2
    _predicted = 3

    def forward(  # type: ignore[override]  # as in mmcv: a packed layer takes only the image
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H_out, W_out]
        """Predict the offsets and masks, and convolve with them."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with the given weight and bias, into which mmcv's ConvModule may have folded a normalization."""
        taps = self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        # dim=-3, because conv_offset also accepts an image without a batch dimension; the operator then refuses it.
        offset, mask = self._predict(x).split((2 * taps, taps), dim=-3)
        return self._convolve(x, offset, weight, bias, mask.sigmoid())


def prepack(model: nn.Module) -> nn.Module:
    """Pack the weights of a model's deformable convolutions, so that a CPU need not pack them in each call.

    This is for inference in float32 or float64, in eager mode. The output has the same bits; each packed layer takes
    the memory of a second weight. Layers in another type or on another device stay as they are, and so do layers whose
    weight is computed (weight standardization, spectral norm).

    A layer discards its packed weight when it is trained (`train()`, or a call that records the weight's gradient),
    loaded (`load_state_dict`), moved or converted (`to`), copied or pickled; so call it within `torch.no_grad()`. It
    does not use the packed weight after any other change of its weight, except one that torch itself cannot see: a
    write through `weight.data`, `weight.numpy()` or DLPack, or into a weight that was made in inference mode. Call
    `prepack` again after a change.

    Args:
        model: A detector, or any module, in eval mode. It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError('model must be in eval mode to be prepacked, got a model in training mode: call model.eval()')
    for layer in model.modules():
        if isinstance(layer, _DeformConv):
            layer._packed_weight = PackedWeight.of(layer.weight, layer.groups)
    return model
