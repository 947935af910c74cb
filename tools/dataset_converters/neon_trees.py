# SPDX-License-Identifier: Apache-2.0
"""Make a tree detection dataset of real aerial photographs, see mmdcn/datasets/neon_trees.py."""

import sys

from mmdcn.datasets.neon_trees import main

if __name__ == '__main__':
    sys.exit(main())
