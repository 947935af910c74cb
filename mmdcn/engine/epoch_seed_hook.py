# SPDX-License-Identifier: Apache-2.0
"""A hook that makes a resumed run equal to an uninterrupted one."""

from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed

from mmdcn.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Reseed every random generator at the start of each epoch, from the run's seed and the epoch number.

    mmengine's checkpoints do not contain the state of the random generators, which sample anchors and draw
    augmentations. So a resumed run draws other numbers. With this hook, and with data loaded in the main process
    (`num_workers=0`), a run that is resumed at an epoch gives the same bits as one that was not interrupted.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the generators."""
        set_random_seed(runner.seed + runner.epoch, diff_rank_seed=True)
