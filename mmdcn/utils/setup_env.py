# SPDX-License-Identifier: Apache-2.0
"""Registers all that configs name; `mmengine.hub.get_model` asks for it."""

import mmdet.utils
from mmengine.registry import init_default_scope as set_default_scope


def register_all_modules(init_default_scope: bool = True) -> None:
    """Register mmdet's modules; those of mmdcn register themselves when they are named.

    Args:
        init_default_scope: Whether plain names mean mmdet's from here on, as they do in mmdcn's configs.
    """
    mmdet.utils.register_all_modules(init_default_scope=False)
    if init_default_scope:
        set_default_scope('mmdet')
