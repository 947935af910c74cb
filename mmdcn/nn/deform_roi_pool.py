# SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling layers with mmcv's arguments, attributes and parameters, on mmdcn's operator."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmdcn.nn._predictors import LinearPredictor
from mmdcn.nn._tracing import OneNode
from mmdcn.ops import deform_roi_pool
from mmdcn.ops._arguments import count, pair


class DeformRoIPool(OneNode, nn.Module):
    """Deformable RoI pooling that takes its offsets as an input (Dai et al., ICCV 2017, section 2.2).

    The arguments are those of `mmcv.ops.DeformRoIPool`.

    Args:
        output_size: Number of bins of a region, ph x pw: one integer or (y, x).
        spatial_scale: Pixels of the input per pixel of the image, in which the regions are given.
        sampling_ratio: Samples per bin along each axis. With 0, a bin has as many samples as pixels, rounded up.
        gamma: Factor on the offsets, which are in units of the region's size.

    Raises:
        ValueError: If an argument is not a number, or too small.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        nn.Module.__init__(self)  # not super(): in a registered layer, the next base is mmcv's layer
        self.output_size = pair(output_size, 'output_size', 1)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = count(sampling_ratio, 'sampling_ratio')
        self.gamma = float(gamma)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f'output_size={self.output_size}, spatial_scale={self.spatial_scale}, '
            f'sampling_ratio={self.sampling_ratio}, gamma={self.gamma}'
        )

    def forward(
        self,
        input: Tensor,  # [B, C, H, W]
        rois: Tensor,  # [N, 5]
        offset: Tensor | None = None,  # [N, 2, ph, pw]
    ) -> Tensor:  # [N, C, ph, pw]
        """Apply `mmdcn.ops.deform_roi_pool`."""
        return deform_roi_pool(
            input, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma
        )


class _PackedDeformRoIPool(DeformRoIPool):
    """Base class of the layers that predict their offsets."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = count(output_channels, 'output_channels', 1)
        self.deform_fc_channels = count(deform_fc_channels, 'deform_fc_channels', 1)
        bins = self.output_size[0] * self.output_size[1]
        self.offset_fc = nn.Sequential(
            nn.Linear(bins * self.output_channels, self.deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(self.deform_fc_channels, self.deform_fc_channels),
            nn.ReLU(inplace=True),
            LinearPredictor(self.deform_fc_channels, bins * 2),
        )

    def _pool_without_offsets(self, input: Tensor, rois: Tensor) -> Tensor:  # [N, C * ph * pw]
        """Pool without offsets the features from which the offsets are predicted."""
        channels = self.output_channels
        if input.dim() == 4 and input.shape[1] != channels:  # the operator reports a wrong rank
            raise ValueError(
                f'input must have {channels} channels, the output_channels of the layer, got shape {list(input.shape)}'
            )
        return DeformRoIPool.forward(self, input, rois).flatten(1)

    def _pool(self, input: Tensor, rois: Tensor, bins: Tensor) -> Tensor:  # [N, C, ph, pw]
        """Predict the offsets from the bins, and pool with them."""
        offset = self.offset_fc(bins).unflatten(1, (2, *self.output_size))
        return DeformRoIPool.forward(self, input, rois, offset)


class DeformRoIPoolPack(_PackedDeformRoIPool):
    """Deformable RoI pooling that predicts its offsets from regions pooled without them (Dai et al., ICCV 2017, 2.2).

    The arguments and parameters are those of `mmcv.ops.DeformRoIPoolPack`. The offsets start at zero, so that the layer
    starts as RoIAlign.

    Args:
        output_size: As in `DeformRoIPool`.
        output_channels: Channels of the input and of the output.
        deform_fc_channels: Channels of the hidden layers that predict the offsets.
        spatial_scale: As in `DeformRoIPool`.
        sampling_ratio: Likewise.
        gamma: Likewise.

    Raises:
        ValueError: As in `DeformRoIPool`.
    """

    def forward(  # type: ignore[override]  # as in mmcv: a packed layer takes no offsets
        self,
        input: Tensor,  # [B, C, H, W]
        rois: Tensor,  # [N, 5]
    ) -> Tensor:  # [N, C, ph, pw]
        """Predict the offsets, and pool with them."""
        return self._pool(input, rois, self._pool_without_offsets(input, rois))


class ModulatedDeformRoIPoolPack(_PackedDeformRoIPool):
    """Deformable RoI pooling that predicts its offsets and a mask for each bin (Zhu et al., CVPR 2019, 3.2).

    The arguments are those of `DeformRoIPoolPack`, the parameters those of `mmcv.ops.ModulatedDeformRoIPoolPack`.
    Offsets start at 0 and masks at 0.5.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma)
        bins = self.output_size[0] * self.output_size[1]
        self.mask_fc = nn.Sequential(
            nn.Linear(bins * self.output_channels, self.deform_fc_channels),
            nn.ReLU(inplace=True),
            LinearPredictor(self.deform_fc_channels, bins),
            nn.Sigmoid(),
        )

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # [B, C, H, W]
        rois: Tensor,  # [N, 5]
    ) -> Tensor:  # [N, C, ph, pw]
        """Predict the offsets and masks, and pool with them."""
        bins = self._pool_without_offsets(input, rois)
        mask: Tensor = self.mask_fc(bins).unflatten(1, (1, *self.output_size))
        return self._pool(input, rois, bins) * mask
