# SPDX-License-Identifier: Apache-2.0
"""mmcv's operators where mmcv was installed without compiling them: those of mmdcn.

Python finds a compiled `_ext` in the same folder before this file.
"""

import sys

from mmdcn.openmmlab import mmcv_ext

sys.modules[__name__] = mmcv_ext
