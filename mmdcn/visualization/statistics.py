# SPDX-License-Identifier: Apache-2.0
"""The offsets of a layer in a few numbers."""

from dataclasses import dataclass

from torch import Tensor

from mmdcn.visualization.sampling import Sampling


@dataclass(frozen=True)
class OffsetStatistics:
    """Of all taps, positions, offset groups and images of one call of a layer.

    The length of an offset is that of its vector (y, x), in pixels of the map that the layer samples.
    """

    mean: float  # length, in pixels
    percentile_99: float  # length, in pixels
    relative: float  # mean length over the shorter side of the map
    outside: float  # of the samples that begin inside the map, the share that offsets move out, where all is zero


def offset_statistics(sampling: Sampling) -> OffsetStatistics:
    """Measure the offsets of one call of a layer; of offsets that are not finite, the lengths are not either."""
    height, width = sampling.input.shape[-2:]
    lengths = sampling.offset.square().sum(3).sqrt().flatten()
    if lengths.numel() == 0:
        return OffsetStatistics(0.0, 0.0, 0.0, 0.0)
    started = _inside(sampling.regular, height, width).expand(sampling.offset.shape[:3] + sampling.offset.shape[4:])
    ended = _inside(sampling.regular + sampling.offset, height, width)
    mean = lengths.mean().item()
    return OffsetStatistics(
        mean,
        lengths.kthvalue(-(-99 * lengths.numel() // 100)).values.item(),
        mean / min(height, width),
        (started & ~ended).sum().item() / max(int(started.sum()), 1),
    )


def _inside(places: Tensor, height: int, width: int) -> Tensor:  # [..., 2, H_out, W_out] -> [..., H_out, W_out]
    """Tell which places have a corner inside the map; all others sample zero."""
    y, x = places.unbind(-3)
    return (y > -1) & (y < height) & (x > -1) & (x < width)
