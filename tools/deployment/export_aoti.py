# SPDX-License-Identifier: Apache-2.0
"""Compile a detector with AOTInductor for programs without Python, see demo/cpp."""

import sys

from mmdcn import deployment
from mmdcn.deployment.command import main
from mmdcn.engine.launch import run

if __name__ == '__main__':
    sys.exit(run(lambda: main(__doc__, deployment.export_aoti, '.pt2')))
