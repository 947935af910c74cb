# SPDX-License-Identifier: Apache-2.0
"""The wider switch: once this module is imported, mmdet's own heads and necks are on mmdcn too.

A config of RepPoints, VFNet or TOOD imports it by `custom_imports=dict(imports=['mmdcn.overrides_everywhere'])`;
`mmdcn.overrides` is enough where mmdet asks its registry for the layer.
"""

from mmdcn.openmmlab.switches import patch_mmdet

patch_mmdet()
