# SPDX-License-Identifier: Apache-2.0
"""Tools that show what deformable layers do: sampling locations, offset statistics, receptive fields."""

from mmdcn.visualization.grids import Grid, GridTracker
from mmdcn.visualization.receptive_field import effective_receptive_field
from mmdcn.visualization.sampling import Sampling, watched
from mmdcn.visualization.sampling_points import SampledLayer, SamplingRecorder
from mmdcn.visualization.statistics import OffsetStatistics, offset_statistics

__all__ = [
    'Grid',
    'GridTracker',
    'OffsetStatistics',
    'SampledLayer',
    'Sampling',
    'SamplingRecorder',
    'effective_receptive_field',
    'offset_statistics',
    'watched',
]
