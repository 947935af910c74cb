# SPDX-License-Identifier: Apache-2.0
"""Registration of everything that configs name; `mmengine.hub.get_model` calls it."""

import mmdet.utils
from mmengine.registry import init_default_scope as set_default_scope


def register_all_modules(init_default_scope: bool = True) -> None:
    """Register mmdet's modules; mmdcn's are registered when a config names them.

    Args:
        init_default_scope: Whether names without a scope refer to mmdet from now on, as in mmdcn's configs.
    """
    mmdet.utils.register_all_modules(init_default_scope=False)
    if init_default_scope:
        set_default_scope('mmdet')
