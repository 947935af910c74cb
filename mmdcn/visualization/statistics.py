# SPDX-License-Identifier: Apache-2.0
"""Statistics of the offsets of a layer."""

from dataclasses import dataclass

from torch import Tensor

from mmdcn.visualization.sampling import Sampling


@dataclass(frozen=True)
class OffsetStatistics:
    """Statistics over all taps, positions, offset groups and images of one call of a layer.

    The length of an offset is the norm of its vector (y, x), in pixels of the layer's input.
    """

    mean: float  # mean length, in pixels
    percentile_99: float  # 99th percentile of the length, in pixels
    relative: float  # mean length divided by the shorter side of the input
    outside: float  # share of the taps inside the input whose offset moves them outside, where the sample is zero


def offset_statistics(sampling: Sampling) -> OffsetStatistics:
    """Compute the statistics of one call of a layer; offsets that are not finite give lengths that are not finite."""
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
    """Return which locations have a corner inside the map; all others sample zero."""
    y, x = places.unbind(-3)
    return (y > -1) & (y < height) & (x > -1) & (x < width)
