# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: conversion from other projects, offset layouts, the model zoo."""

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
