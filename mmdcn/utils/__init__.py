# SPDX-License-Identifier: Apache-2.0
"""What mmengine asks of a package by these names."""

from mmdcn.utils.setup_env import register_all_modules

__all__ = ['register_all_modules']
