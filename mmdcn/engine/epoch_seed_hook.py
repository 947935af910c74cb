# SPDX-License-Identifier: Apache-2.0
"""Runs that end the same whether or not they were interrupted."""

from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed

from mmdcn.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every random generator anew at each epoch, from the run's seed and the epoch's number.

    mmengine's checkpoints do not hold the state of the generators, which draw the samples of anchors and the
    augmentations: a resumed run goes on with other draws. With this hook, and data loaded in the main process
    (`num_workers=0`), a run resumed at an epoch repeats to the bit what an undisturbed one would have done.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the generators."""
        set_random_seed(runner.seed + runner.epoch, diff_rank_seed=True)
