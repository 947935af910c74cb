# SPDX-License-Identifier: Apache-2.0
"""Runs whose results do not depend on interruptions."""

from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed

from mmdcn.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every random generator anew at each epoch, from the run's seed and the epoch's number.

    mmengine's checkpoints do not hold the state of the generators, which draw the samples of anchors and the
    augmentations, so a resumed run draws other numbers. With this hook, and data loaded in the main process
    (`num_workers=0`), a run that is resumed at an epoch gives the same bits as one that was not interrupted.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the generators."""
        set_random_seed(runner.seed + runner.epoch, diff_rank_seed=True)
