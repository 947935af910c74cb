# SPDX-License-Identifier: Apache-2.0
"""What a run needs around a detector."""

from mmdcn.engine.epoch_seed_hook import EpochSeedHook

__all__ = ['EpochSeedHook']
