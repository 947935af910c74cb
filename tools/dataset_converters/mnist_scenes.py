# SPDX-License-Identifier: Apache-2.0
"""Make a detection dataset of deformed and rotated handwritten digits, see mmdcn/datasets/mnist_scenes.py."""

import sys

from mmdcn.datasets.mnist_scenes import main

if __name__ == '__main__':
    sys.exit(main())
