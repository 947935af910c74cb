# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for MMDetection.

`mmdcn.ops` and `mmdcn.reference` need torch alone. Whatever speaks OpenMMLab is imported when it is first used:
by name (`mmdcn.modules`), or by a config that says `type='mmdcn.DCNv2'`.
"""

from mmdcn import ops, reference
from mmdcn.version import __version__

__all__ = ['__version__', 'ops', 'reference']
