# SPDX-License-Identifier: Apache-2.0
"""The environment for a bug report, as a table: `python -m mmdcn.info`."""

import platform
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

from mmdcn import _extension
from mmdcn.version import __version__

_INSTRUCTION_SETS = {'_C_avx512': 'AVX-512', '_C_avx2': 'AVX2', '_C': 'neither AVX-512 nor AVX2'}


def collect_env() -> dict[str, str]:
    """Return the versions, the libraries in use, the GPUs and the origin of mmcv's operators, by name."""
    packages = ('mmengine', 'mmcv', 'mmdet', 'numpy', 'onnxscript', 'torchvision')
    return {
        'mmdcn': f'{__version__}, {Path(__file__).parent}',
        'CPU library': _describe_cpu_library(),
        'CUDA library': _describe_cuda_library(),
        'GPU': _describe_gpus(),
        'operators of mmcv': _describe_mmcv_operators(),
        'torch': f'{torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads',
        **{package: _describe_package(package) for package in packages},
        'Python': platform.python_version(),
        'system': f'{platform.platform()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}',
    }


def _describe_cpu_library() -> str:
    name = _extension.libraries[0].name.split('.')[0]
    onednn = '' if _extension.knows_onednn() else ', without oneDNN'
    return f'{name} ({_INSTRUCTION_SETS[name]}){onednn}'


def _describe_cuda_library() -> str:
    if torch.version.cuda is None:
        return 'not loaded: this torch is built without CUDA'
    return f'not loaded: {_extension.cuda_error}' if _extension.cuda_error else 'loaded'


def _describe_gpus() -> str:
    if not torch.cuda.is_available():
        return 'torch finds none'
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ', '.join(f'{device.name} (sm_{device.major}{device.minor})' for device in devices)


def _describe_mmcv_operators() -> str:
    try:
        file = str(import_module('mmcv._ext').__file__)
    except ImportError as error:  # mmcv, its operators or a library that they need
        return f'none: {error}'
    return f'{"compiled" if file.endswith(tuple(EXTENSION_SUFFIXES)) else "of mmdcn"}, {file}'


def _describe_package(name: str) -> str:
    distributions = set(packages_distributions().get(name, [])) - {'mmdcn-mmcv'}  # it contains only one module of mmcv
    return ', '.join(f'{version(each)} ({each})' for each in sorted(distributions)) or 'not installed'


if __name__ == '__main__':
    environment = collect_env()
    width = max(map(len, environment))
    for key, value in environment.items():
        print(f'{key:{width}}  {value}')
