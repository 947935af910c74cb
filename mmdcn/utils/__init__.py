# SPDX-License-Identifier: Apache-2.0
"""Functions that mmengine looks up by name in a package."""

from mmdcn.utils.setup_env import register_all_modules

__all__ = ['register_all_modules']
