# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled core: the CPU library for this processor, and the CUDA library for a CUDA build of torch."""

import os
import warnings
from pathlib import Path

import torch

_CPU_LIBRARIES = {'AVX512': '_C_avx512', 'AVX2': '_C_avx2'}


def load() -> None:
    """Load the libraries that define `torch.ops.mmdcn`.

    Raises:
        ImportError: If the core was never built, or was built for another torch.
    """
    folder = Path(__file__).parent
    # torch knows what the processor has, and its ATEN_CPU_CAPABILITY turns it down.
    name = _CPU_LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), '_C')
    _load_library(folder / f'{name}.abi3.so')
    cuda_library = folder / '_C_cuda.abi3.so'
    if torch.version.cuda is None:
        return
    if cuda_library.exists():
        _load_library(cuda_library)
    else:
        warnings.warn(
            f'mmdcn was built without CUDA, but torch {torch.__version__} has it: mmdcn will run on the CPU alone. '
            'To build the CUDA library, put nvcc on the PATH and install mmdcn again.',
            stacklevel=2,
        )


def _load_library(path: Path) -> None:
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        raise ImportError(
            f'mmdcn could not load its compiled core {path.name} into torch {torch.__version__}: {error}. '
            'Build it with `pip install --no-build-isolation -e .` in a checkout of mmdcn.'
        ) from error
