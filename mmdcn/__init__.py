# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for MMDetection.

`mmdcn.ops`, `mmdcn.nn` and `mmdcn.reference` need torch alone. Whatever needs OpenMMLab is imported when it is first
used: by name (`mmdcn.DCNv2`, `mmdcn.modules`, `mmdcn.patch_mmdet`), or by a config with `type='mmdcn.DCNv2'`.

`__all__` is the public surface. A name with an underscore, or a module that is not listed, may change at any time.
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmdcn import nn, ops, reference
from mmdcn.version import __version__

if TYPE_CHECKING:
    from mmdcn import (
        apis,
        checkpoints,
        datasets,
        deployment,
        engine,
        models,
        modules,
        onnx,
        registry,
        utils,
        visualization,
    )
    from mmdcn.apis import DetInferencer
    from mmdcn.checkpoints import layouts, zoo
    from mmdcn.datasets import LoadImageFromFile
    from mmdcn.engine import (
        AmpOptimWrapper,
        DCNOptimWrapperConstructor,
        EpochSeedHook,
        FSDPStrategy,
        OffsetVisualizationHook,
    )
    from mmdcn.models.fuse_conv_bn import fuse_conv_bn
    from mmdcn.models.resnet import ResNet, ResNetV1d
    from mmdcn.models.roi_extractor import SingleRoIExtractor
    from mmdcn.modules import (
        DCN,
        DCNv2,
        DeformConv2d,
        DeformConv2dPack,
        DeformRoIPool,
        DeformRoIPoolPack,
        ModulatedDCN,
        ModulatedDeformConv2d,
        ModulatedDeformConv2dPack,
        ModulatedDeformRoIPoolPack,
    )
    from mmdcn.nn.deform_conv2d import prepack
    from mmdcn.openmmlab.convert_model import convert_model
    from mmdcn.openmmlab.switches import patch_mmdet, unpatch_mmdet

__all__ = [
    'DCN',
    'AmpOptimWrapper',
    'DCNOptimWrapperConstructor',
    'DCNv2',
    'DeformConv2d',
    'DeformConv2dPack',
    'DeformRoIPool',
    'DeformRoIPoolPack',
    'DetInferencer',
    'EpochSeedHook',
    'FSDPStrategy',
    'LoadImageFromFile',
    'ModulatedDCN',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
    'ModulatedDeformRoIPoolPack',
    'OffsetVisualizationHook',
    'ResNet',
    'ResNetV1d',
    'SingleRoIExtractor',
    '__version__',
    'apis',
    'checkpoints',
    'convert_model',
    'datasets',
    'deployment',
    'engine',
    'fuse_conv_bn',
    'layouts',
    'models',
    'modules',
    'nn',
    'onnx',
    'ops',
    'patch_mmdet',
    'prepack',
    'reference',
    'registry',
    'unpatch_mmdet',
    'utils',
    'visualization',
    'zoo',
]

# The modules of the names that are imported when they are first used; all other names are modules of this package.
_HOMES = {
    'AmpOptimWrapper': 'mmdcn.engine',
    'DCNOptimWrapperConstructor': 'mmdcn.engine',
    'DetInferencer': 'mmdcn.apis',
    'EpochSeedHook': 'mmdcn.engine',
    'FSDPStrategy': 'mmdcn.engine',
    'LoadImageFromFile': 'mmdcn.datasets',
    'OffsetVisualizationHook': 'mmdcn.engine',
    'ResNet': 'mmdcn.models.resnet',
    'ResNetV1d': 'mmdcn.models.resnet',
    'SingleRoIExtractor': 'mmdcn.models.roi_extractor',
    'convert_model': 'mmdcn.openmmlab.convert_model',
    'fuse_conv_bn': 'mmdcn.models.fuse_conv_bn',
    'patch_mmdet': 'mmdcn.openmmlab.switches',
    'prepack': 'mmdcn.nn.deform_conv2d',
    'unpatch_mmdet': 'mmdcn.openmmlab.switches',
    **dict.fromkeys(nn.__all__, 'mmdcn.modules'),
}
_MODULES = {'layouts': 'mmdcn.checkpoints.layouts', 'zoo': 'mmdcn.checkpoints.zoo'}

with suppress(ImportError):  # mmengine is optional
    from mmengine.config.utils import MODULE2PACKAGE

    # Lets mmengine find `mmdcn::…` in the folder of the module that is named here. For an editable install, mmengine
    # 0.10.7 would get the folder of the package `mmdcn` itself wrong.
    MODULE2PACKAGE['mmdcn'] = 'mmdcn.version'


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(_MODULES.get(name, f'mmdcn.{name}'))
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
