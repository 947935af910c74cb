# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for MMDetection.

`mmdcn.ops` and `mmdcn.reference` need torch alone. Whatever speaks OpenMMLab is imported when it is first used:
by name (`mmdcn.modules`, `mmdcn.patch_mmdet`), or by a config that says `type='mmdcn.DCNv2'`.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

from mmdcn import ops, reference
from mmdcn.version import __version__

_LAZY = {
    'DCNOptimWrapperConstructor': 'mmdcn.engine',
    'DetInferencer': 'mmdcn.apis',
    'ResNet': 'mmdcn.models',
    'SingleRoIExtractor': 'mmdcn.models',
    'convert_model': 'mmdcn.patching',
    'fuse_conv_bn': 'mmdcn.models',
    'layouts': 'mmdcn.checkpoints',
    'patch_mmdet': 'mmdcn.patching',
    'unpatch_mmdet': 'mmdcn.patching',
    'zoo': 'mmdcn.checkpoints',
}

__all__ = ['__version__', 'ops', 'reference', *sorted(_LAZY)]

with suppress(ImportError):  # mmengine is optional
    from mmengine.config.utils import MODULE2PACKAGE

    # Lets mmengine find `mmdcn::…`. It takes the folder of what is named here; that of the package `mmdcn` itself
    # mmengine 0.10.7 gets wrong for an editable install.
    MODULE2PACKAGE['mmdcn'] = 'mmdcn.version'


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_LAZY[name]), name)
