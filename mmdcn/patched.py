# SPDX-License-Identifier: Apache-2.0
"""The old name of `mmdcn.overrides_everywhere`, which works for one more release."""

import warnings

from mmdcn.openmmlab.switches import patch_mmdet

warnings.warn(
    'mmdcn.patched is now mmdcn.overrides_everywhere: use the new name in custom_imports. The next release removes '
    'the old name',
    FutureWarning,
    stacklevel=2,
)
patch_mmdet()
