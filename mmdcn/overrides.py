# SPDX-License-Identifier: Apache-2.0
"""The switch: once this module is imported, `DCN` and `DCNv2` mean mmdcn's layers in the scope of mmdet.

A config imports it by `custom_imports=dict(imports=['mmdcn.overrides'])`.
"""

from mmdcn.openmmlab.switches import override_names

override_names()
