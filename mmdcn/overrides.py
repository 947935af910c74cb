# SPDX-License-Identifier: Apache-2.0
"""The switch: importing this module makes `DCN` and `DCNv2` refer to mmdcn's layers in the scope of mmdet.

A config imports it with `custom_imports=dict(imports=['mmdcn.overrides'])`.
"""

from mmdcn.openmmlab.switches import override_names

override_names()
