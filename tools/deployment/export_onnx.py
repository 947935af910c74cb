# SPDX-License-Identifier: Apache-2.0
"""Export a detector to ONNX, from images to boxes and scores, with only standard operators."""

import sys

from mmdcn import deployment
from mmdcn.deployment.command import main
from mmdcn.engine.launch import run

if __name__ == '__main__':
    sys.exit(run(lambda: main(__doc__, deployment.export_onnx, '.onnx')))
