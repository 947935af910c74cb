# SPDX-License-Identifier: Apache-2.0
"""Loading the compiled core: the CPU library for this processor, and the CUDA library for a CUDA build of torch."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from mmdcn._private_hooks import has_avx2, has_avx512

_X86_64_V3 = {'avx2', 'fma3', 'f16c', 'bmi', 'bmi2', 'lzcnt'}
_X86_64_V4 = _X86_64_V3 | {'avx512_f', 'avx512_bw', 'avx512_cd', 'avx512_dq', 'avx512_vl'}
# The widest first: torch's name of the instruction set, and the processor features that the library's code needs.
_CPU_LIBRARIES = {'_C_avx512': ('AVX512', _X86_64_V4), '_C_avx2': ('AVX2', _X86_64_V3)}
# The schemas of oneDNN's operators as csrc/cpu/linear.h calls them.
_ONEDNN = {
    '_linear_pointwise': '(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y',
    '_reorder_linear_weight': '(Tensor self, int? batch_size=None) -> Tensor Y',
}
_OLDEST_TORCH = (2, 10)
_OLDEST_CAPABILITY = (8, 0)  # the first of CUDA_ARCHITECTURES in setup.py
_BUILD = 'Build it with `pip install --no-build-isolation .` in a checkout of mmdcn'

libraries: list[Path] = []  # the loaded ones
cuda_error: ImportError | None = None  # why the CUDA library is not loaded


def load() -> None:
    """Load the libraries that define `torch.ops.mmdcn`.

    A CUDA library that is missing or does not load is not an error here: the CPU works without it, and `check_device`
    raises the error when an operator runs on CUDA.

    Raises:
        ImportError: If torch is too old, or the CPU library is missing or does not load.
    """
    global cuda_error
    # Compare only the numbers: vendors' images have pre-releases of 2.10, such as 2.10.0a0+….
    if tuple(map(int, torch.__version__.split('.')[:2])) < _OLDEST_TORCH:
        oldest = '.'.join(map(str, _OLDEST_TORCH))
        raise ImportError(
            f'mmdcn needs torch {oldest} or later, for its stable ABI, got torch {torch.__version__}. '
            f"Upgrade it with `pip install 'torch>={oldest}'`"
        )
    path = _load_library(_cpu_library())
    ctypes.c_bool.in_dll(ctypes.CDLL(str(path)), 'mmdcn_knows_onednn').value = knows_onednn()
    if torch.version.cuda is not None:
        try:
            _load_library('_C_cuda')
        except ImportError as error:
            cuda_error = error


def _processor_features() -> set[str]:
    """Return the features that the processor reports, by the names of torch.cpu.get_capabilities."""
    if hasattr(torch.cpu, 'get_capabilities'):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    # An older torch reports only these two features.
    features = _X86_64_V3 if has_avx2() else set()
    return features | (_X86_64_V4 if has_avx512() else set())


def _cpu_library() -> str:
    """Choose the library with the widest instruction set that the processor has.

    The environment variable ATEN_CPU_CAPABILITY can lower the instruction set of torch, and so of the library. If it
    names one that the processor does not have, torch uses it anyway; the library does not.
    """
    capability, features = torch.backends.cpu.get_cpu_capability(), _processor_features()
    for name, (instruction_set, needed) in _CPU_LIBRARIES.items():
        if capability in ('AVX512', instruction_set) and needed <= features:
            return name
    return '_C'


def knows_onednn() -> bool:
    """Tell whether torch has oneDNN's operators with exactly the arguments that the core passes.

    A build of torch may lack them, and a later version may add arguments. The core then uses torch's plain product.
    """
    return all(
        hasattr(torch.ops.mkldnn, name)
        and str(getattr(torch.ops.mkldnn, name).default._schema) == f'mkldnn::{name}{arguments}'
        for name, arguments in _ONEDNN.items()
    )


@cache
def check_device(device: torch.device) -> None:
    """Check that the core has kernels for a CUDA device, once per device.

    Raises:
        RuntimeError: If the CUDA library was not loaded, or the device is older than all of its architectures.
    """
    if cuda_error is not None:
        raise RuntimeError(
            f'mmdcn cannot run on {device}: {cuda_error}, with nvcc on the PATH; or use the CPU'
        ) from cuda_error
    _check_capability(device, torch.cuda.get_device_capability(device))


def _check_capability(device: torch.device, capability: tuple[int, int]) -> None:
    if capability < _OLDEST_CAPABILITY:
        got, needed = ('.'.join(map(str, version)) for version in (capability, _OLDEST_CAPABILITY))
        raise RuntimeError(
            f'mmdcn cannot run on {device}: it has compute capability {got}, and mmdcn is compiled for {needed} '
            '(Ampere) and later. Use a newer GPU, or the CPU'
        )


def _load_library(name: str) -> Path:
    path = Path(__file__).with_name(f'{name}.abi3.so')
    if not path.exists():
        raise ImportError(f'{path} is missing: mmdcn was not built, or was built without it. {_BUILD}')
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f'{path} does not load into torch {torch.__version__}: {error}. It may be for another system. {_BUILD}'
        ) from error
    libraries.append(path)
    return path
