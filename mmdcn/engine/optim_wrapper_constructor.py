# SPDX-License-Identifier: Apache-2.0
"""A separate learning rate for all layers that predict offsets."""

import logging
import re
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmdcn.registry import OPTIM_WRAPPER_CONSTRUCTORS

_PREDICTS_OFFSETS = re.compile(
    r'(^|\.)((spatial_)?conv_offset|offset(_[sl])?|(tl|br)_dcn_offset|reg_offset_module)(\.|$)'
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DCNOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, whose `dcn_offset_lr_mult` reaches every layer that predicts offsets, and only those.

    mmengine's constructor reaches only those inside mmcv's deformable layers and their subclasses, which include
    mmdcn's. Heads and necks keep theirs outside the deformable layer. The rule: a layer predicts offsets if its output
    is used only as the offsets (and masks) of a deformable convolution. These layers are found by module name:

    - `conv_offset` in packed layers, whatever their class; FoveaBox's FeatureAlign; guided anchoring's FeatureAdaption
    - `spatial_conv_offset` in DyHead
    - `offset` in GLIP's DyConv
    - `offset_s` and `offset_l` in the switchable atrous convolution of DetectoRS
    - `tl_dcn_offset` and `br_dcn_offset` in CentripetalNet
    - `reg_offset_module` in TOOD, both of its convolutions

    It does not reach layers whose output is also a prediction with its own loss (the points of RepPoints, the boxes of
    VFNet), nor the fully connected layers of deformable RoI pooling. `custom_keys` takes precedence, as in mmengine.

    Args:
        optim_wrapper_cfg: As in `mmengine.optim.DefaultOptimWrapperConstructor`.
        paramwise_cfg: Likewise. `dcn_offset_lr_mult` is a factor on the learning rate, 0 or more. As in mmengine, the
            rules for biases do not apply to the layers that it reaches. If it reaches none, a warning says so.

    Example:
        `optim_wrapper = dict(constructor='mmdcn.DCNOptimWrapperConstructor',
        paramwise_cfg=dict(dcn_offset_lr_mult=0.1), ...)`
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a model."""
        self._reached = False
        wrapper = super().__call__(model)
        if 'dcn_offset_lr_mult' in self.paramwise_cfg and not self._reached:
            print_log(
                'dcn_offset_lr_mult has no effect: the model has no trainable layer that predicts offsets',
                logger='current',
                level=logging.WARNING,
            )
        return wrapper

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the parameters of a module and its children, like mmengine's method of this name."""
        if not _PREDICTS_OFFSETS.search(prefix):
            super().add_params(params, module, prefix, is_dcn_module)
            return
        start = len(params)
        super().add_params(params, module, prefix, is_dcn_module=True)
        factor = self.paramwise_cfg.get('dcn_offset_lr_mult')
        if factor is not None:
            for group in params[start:]:
                group.setdefault('lr', self.base_lr * factor)  # custom_keys may have set it
                self._reached = True
