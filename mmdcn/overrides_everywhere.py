# SPDX-License-Identifier: Apache-2.0
"""The wider switch: importing this module makes mmdet's own heads and necks use mmdcn, too.

A config of RepPoints, VFNet or TOOD imports it with `custom_imports=dict(imports=['mmdcn.overrides_everywhere'])`;
`mmdcn.overrides` is enough if mmdet gets the layer from its registry.
"""

from mmdcn.openmmlab.switches import patch_mmdet

patch_mmdet()
