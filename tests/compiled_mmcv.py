# SPDX-License-Identifier: Apache-2.0
"""Whether mmcv's own compiled operators are there; packages/mmdcn-mmcv puts a file of the same name in their place."""

from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec


@cache
def has_compiled_mmcv() -> bool:
    if find_spec('mmcv') is None:
        return False
    spec = find_spec('mmcv._ext')
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)
