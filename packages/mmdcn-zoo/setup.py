# SPDX-License-Identifier: Apache-2.0
"""Packages the checkpoints that are beside their configs in a checkout of mmdcn."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


class BuildPackage(build_py):
    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # it may contain checkpoints of an earlier build
        super().run()
        checkpoints = sorted(CONFIGS.glob('*/*.pth'))
        if not checkpoints:
            raise SystemExit(f'no checkpoint below {CONFIGS}: build mmdcn-zoo in a git checkout of mmdcn')
        for checkpoint in checkpoints:
            shutil.copy(checkpoint, Path(self.build_lib, 'mmdcn_zoo'))


setup(cmdclass={'build_py': BuildPackage})
