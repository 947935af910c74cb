# SPDX-License-Identifier: Apache-2.0
"""Datasets of a few scenes, and what lies in their folders."""

import json
from pathlib import Path

from mmdcn.datasets import mnist_scenes


def make_mnist(out: Path, **flags: object) -> int:
    flags = {'num_train': 3, 'num_test': 2} | flags
    words = [f'--{name.replace("_", "-")}={value}' for name, value in flags.items()]
    return mnist_scenes.main([f'--out-dir={out}', *words])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def load(out: Path, split: str) -> dict:
    return json.loads((out / 'annotations' / f'{split}.json').read_text())
