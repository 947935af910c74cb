# SPDX-License-Identifier: Apache-2.0
"""The registry that mmengine finds by itself when a config says `type='mmdcn.…'`."""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmdcn', locations=['mmdcn.modules'])
