# SPDX-License-Identifier: Apache-2.0
"""The old name of `mmdcn.overrides_everywhere`, for one release."""

import warnings

from mmdcn.openmmlab.switches import patch_mmdet

warnings.warn(
    'mmdcn.patched is now mmdcn.overrides_everywhere: name that in custom_imports. The old name goes with the next '
    'release',
    FutureWarning,
    stacklevel=2,
)
patch_mmdet()
