# SPDX-License-Identifier: Apache-2.0
"""Parts of a training run: hooks, strategies, optimizer constructors."""

from mmdcn.engine.amp_optim_wrapper import AmpOptimWrapper
from mmdcn.engine.epoch_seed_hook import EpochSeedHook
from mmdcn.engine.fsdp_strategy import FSDPStrategy
from mmdcn.engine.offset_visualization_hook import OffsetVisualizationHook
from mmdcn.engine.optim_wrapper_constructor import DCNOptimWrapperConstructor

__all__ = [
    'AmpOptimWrapper',
    'DCNOptimWrapperConstructor',
    'EpochSeedHook',
    'FSDPStrategy',
    'OffsetVisualizationHook',
]
