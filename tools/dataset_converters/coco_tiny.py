# SPDX-License-Identifier: Apache-2.0
"""Make a dataset of five photographs in the layout of COCO, see mmdcn/datasets/coco_tiny.py."""

import sys

from mmdcn.datasets.coco_tiny import main

if __name__ == '__main__':
    sys.exit(main())
