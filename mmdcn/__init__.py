# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for MMDetection.

`mmdcn.ops` and `mmdcn.reference` need torch alone. Whatever speaks OpenMMLab is imported when it is first used:
by name (`mmdcn.DCNv2`, `mmdcn.modules`, `mmdcn.patch_mmdet`), or by a config that says `type='mmdcn.DCNv2'`.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

from mmdcn import ops, reference
from mmdcn.version import __version__

_LAYERS = (
    'DCN',
    'DCNv2',
    'DeformConv2d',
    'DeformConv2dPack',
    'DeformRoIPool',
    'DeformRoIPoolPack',
    'ModulatedDCN',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
    'ModulatedDeformRoIPoolPack',
)
_LAZY = {
    **dict.fromkeys(_LAYERS, 'mmdcn.modules'),
    'DCNOptimWrapperConstructor': 'mmdcn.engine',
    'DetInferencer': 'mmdcn.apis',
    'EpochSeedHook': 'mmdcn.engine',
    'FSDPStrategy': 'mmdcn.engine',
    'LoadImageFromFile': 'mmdcn.datasets',
    'ResNet': 'mmdcn.models.resnet',
    'ResNetV1d': 'mmdcn.models.resnet',
    'SingleRoIExtractor': 'mmdcn.models.roi_extractor',
    'convert_model': 'mmdcn.openmmlab.convert_model',
    'fuse_conv_bn': 'mmdcn.models.fuse_conv_bn',
    'layouts': 'mmdcn.checkpoints',
    'patch_mmdet': 'mmdcn.openmmlab.switches',
    'unpatch_mmdet': 'mmdcn.openmmlab.switches',
    'zoo': 'mmdcn.checkpoints',
}
_PACKAGES = (
    'apis',
    'checkpoints',
    'datasets',
    'engine',
    'models',
    'modules',
    'onnx',
    'registry',
    'utils',
    'visualization',
)

__all__ = ['__version__', 'ops', 'reference', *sorted((*_LAZY, *_PACKAGES))]

with suppress(ImportError):  # mmengine is optional
    from mmengine.config.utils import MODULE2PACKAGE

    # Lets mmengine find `mmdcn::…`. It takes the folder of what is named here; that of the package `mmdcn` itself
    # mmengine 0.10.7 gets wrong for an editable install.
    MODULE2PACKAGE['mmdcn'] = 'mmdcn.version'


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f'mmdcn.{name}')
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_LAZY[name]), name)
