# SPDX-License-Identifier: Apache-2.0
"""The registries that mmengine finds by itself when a config contains `type='mmdcn.…'`."""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry, root

import mmdcn.checkpoints.zoo  # noqa: F401  (so that mmengine loads weights from `mmdcn://…`)
from mmdcn.checkpoints.safe_globals import allow_mmengine_checkpoints

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmdcn',
    locations=['mmdcn.modules', 'mmdcn.models'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmdcn', locations=['mmdcn.engine'])
STRATEGIES = Registry('strategy', parent=MMENGINE_STRATEGIES, scope='mmdcn', locations=['mmdcn.engine'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmdcn', locations=['mmdcn.datasets'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmdcn', locations=['mmdcn.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmdcn',
    locations=['mmdcn.engine'],
)

# mmengine warns if a registry lacks the scope of a config with `_base_ = 'mmdcn::…'`.
for _parent in vars(root).values():
    if isinstance(_parent, Registry) and 'mmdcn' not in _parent.children:
        Registry(_parent.name, parent=_parent, scope='mmdcn', locations=['mmdcn.registry'])

# Any code that builds a model with a layer of mmdcn can load its training checkpoints, such as mmdet's own tools.
allow_mmengine_checkpoints()
