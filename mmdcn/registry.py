# SPDX-License-Identifier: Apache-2.0
"""The registries that mmengine finds by itself when a config says `type='mmdcn.…'`."""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmdcn',
    locations=['mmdcn.modules', 'mmdcn.models'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmdcn', locations=['mmdcn.engine'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmdcn', locations=['mmdcn.datasets'])
