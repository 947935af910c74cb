# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled core: the CPU library for this processor, and the CUDA library for a CUDA build of torch."""

from functools import cache
from pathlib import Path

import torch

_CPU_LIBRARIES = {'AVX512': '_C_avx512', 'AVX2': '_C_avx2'}
_OLDEST_TORCH = (2, 10)
_OLDEST_CAPABILITY = (8, 0)  # the first of CUDA_ARCHITECTURES in setup.py
_BUILD = 'Build it with `pip install --no-build-isolation .` in a checkout of mmdcn'

_cuda_error: ImportError | None = None


def load() -> None:
    """Load the libraries that define `torch.ops.mmdcn`.

    A CUDA library that is missing or does not load is no error here: the CPU works without it, and `check_device`
    tells who asks for more.

    Raises:
        ImportError: If torch is too old, or the CPU library is missing or does not load.
    """
    global _cuda_error
    # Of the version the numbers alone: a build on the way to 2.10, as vendors' images have, is 2.10.0a0+….
    if tuple(map(int, torch.__version__.split('.')[:2])) < _OLDEST_TORCH:
        oldest = '.'.join(map(str, _OLDEST_TORCH))
        raise ImportError(
            f'mmdcn needs torch {oldest} or later, for its stable ABI, got torch {torch.__version__}. '
            f"Upgrade it with `pip install 'torch>={oldest}'`"
        )
    # torch knows what the processor has, and its ATEN_CPU_CAPABILITY turns it down.
    _load_library(_CPU_LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), '_C'))
    if torch.version.cuda is not None:
        try:
            _load_library('_C_cuda')
        except ImportError as error:
            _cuda_error = error


@cache
def check_device(device: torch.device) -> None:
    """Check, once for each CUDA device, that the core has kernels for it.

    Raises:
        RuntimeError: If the CUDA library was not loaded, or the device is older than all that it was compiled for.
    """
    if _cuda_error is not None:
        raise RuntimeError(
            f'mmdcn cannot run on {device}: {_cuda_error}, with nvcc on the PATH; or use the CPU'
        ) from _cuda_error
    _check_capability(device, torch.cuda.get_device_capability(device))


def _check_capability(device: torch.device, capability: tuple[int, int]) -> None:
    if capability < _OLDEST_CAPABILITY:
        got, needed = ('.'.join(map(str, version)) for version in (capability, _OLDEST_CAPABILITY))
        raise RuntimeError(
            f'mmdcn cannot run on {device}: it has compute capability {got}, and mmdcn is compiled for {needed} '
            '(Ampere) and later. Use a newer GPU, or the CPU'
        )


def _load_library(name: str) -> None:
    path = Path(__file__).with_name(f'{name}.abi3.so')
    if not path.exists():
        raise ImportError(f'{path} is missing: mmdcn was not built, or was built without it. {_BUILD}')
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f'{path} does not load into torch {torch.__version__}: {error}. It may be of another system. {_BUILD}'
        ) from error
