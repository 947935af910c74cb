# SPDX-License-Identifier: Apache-2.0
"""mmdcn's operators for an mmcv that was installed without compiling its own.

Python prefers a compiled `_ext` in the same folder to this file.
"""

import sys

from mmdcn.openmmlab import mmcv_ext

sys.modules[__name__] = mmcv_ext
