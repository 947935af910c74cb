# SPDX-License-Identifier: Apache-2.0
"""Weights that were trained elsewhere: their names, their layouts, and their way into mmdcn's layers."""

from mmdcn.checkpoints import layouts
from mmdcn.checkpoints.conversion import SOURCES, Conversion, Source, check_target, convert_state_dict
from mmdcn.checkpoints.version1_keys import accept_version1_keys

__all__ = [
    'SOURCES',
    'Conversion',
    'Source',
    'accept_version1_keys',
    'check_target',
    'convert_state_dict',
    'layouts',
]
