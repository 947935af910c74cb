# SPDX-License-Identifier: Apache-2.0
"""`python -m mmdcn.info` says what is in use."""

import os
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import mmcv
import mmdet
import torch

import mmdcn

WITH_A_MODULE_OF_PYTHON = """
import mmcv, runpy, sys
mmcv.__path__.insert(0, sys.argv[1])
runpy.run_module('mmdcn.info', run_name='__main__')
"""
TORCH_ALONE = """
import importlib.metadata, runpy, sys
sys.modules.update(dict.fromkeys(['mmcv', 'mmdet', 'mmengine']))
importlib.metadata.packages_distributions = lambda: {'torch': ['torch']}
runpy.run_module('mmdcn.info', run_name='__main__')
"""


def report(*arguments: str, **environment: str) -> dict[str, str]:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    width = max(len(line.split('  ')[0]) for line in result.stdout.splitlines())
    return {line[:width].strip(): line[width:].strip() for line in result.stdout.splitlines()}


def test_it_names_versions_libraries_and_whose_operators_mmcv_has() -> None:
    told = report('-m', 'mmdcn.info')
    assert told['mmdcn'] == f'{mmdcn.__version__}, {Path(mmdcn.__file__).parent}'
    assert told['mmcv'].startswith(mmcv.__version__) and told['mmdet'].startswith(mmdet.__version__)
    assert told['torch'].startswith(torch.__version__)
    assert told['Python'] == platform.python_version()
    assert told['operators of mmcv'].endswith(f', {import_module("mmcv._ext").__file__}')
    assert torch.cuda.is_available() or told['GPU'] == 'torch finds none'


def test_it_names_the_library_that_was_chosen() -> None:
    assert report('-m', 'mmdcn.info', ATEN_CPU_CAPABILITY='default')['CPU library'].startswith('_C (neither')


def test_it_tells_mmdcns_operators_from_compiled_ones(tmp_path: Path) -> None:
    (tmp_path / '_ext.py').touch()
    assert report('-c', WITH_A_MODULE_OF_PYTHON, str(tmp_path))['operators of mmcv'] == f'of mmdcn, {tmp_path}/_ext.py'


def test_with_torch_alone_it_says_what_is_missing() -> None:
    told = report('-c', TORCH_ALONE)
    assert told['mmcv'] == told['mmdet'] == told['mmengine'] == 'not installed'
    assert told['operators of mmcv'].startswith('none: ')
