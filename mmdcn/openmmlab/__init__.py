# SPDX-License-Identifier: Apache-2.0
"""What OpenMMLab's own code runs on mmdcn by: `mmcv_ext.py` has the functions of mmcv's compiled operators."""
