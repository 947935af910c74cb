# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled core, and packs what MIM looks for; everything else about the package is in pyproject.toml.

The core uses torch's stable ABI and no Python at all, so that one build serves every torch from 2.10 on and every
Python from 3.10 on. The CPU library is built once per instruction set; `mmdcn._extension` loads the widest that
the processor has. The CUDA library is built wherever nvcc is found, for a CPU-only torch too.
"""

import platform
import shutil
import subprocess
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import setuptools

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which pip does not heed without isolation
if int(setuptools.__version__.split('.')[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f'mmdcn is built with setuptools {OLDEST_SETUPTOOLS} or later, got {setuptools.__version__}. '
        f"Upgrade it with `pip install 'setuptools>={OLDEST_SETUPTOOLS},<82'`"
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths  # noqa: E402

TORCH_TARGET_VERSION = '0x020a000000000000'  # 2.10
CUDA_ARCHITECTURES = (80, 90, 100, 120)  # and PTX of the last for those to come
FUSED = '_fused'  # in the name of a source whose kernels take every register; ptxas spills some of them
HOPPER = '_sm90a.cu'  # the end of a source of instructions that compute capability 9.0 alone has
SOURCES = sorted(str(path) for folder in ('ops', 'cpu') for path in Path('csrc', folder).glob('*.cpp'))
CUDA_SOURCES = sorted(str(path) for path in Path('csrc/cuda').glob('*.cu'))
DEPENDS = sorted(str(path) for path in Path('csrc').rglob('*.*h'))
MIM = ('configs', 'demo', 'tools', 'model-index.yml')
INSTRUCTION_SETS = {'_C': []}
if platform.machine() in ('x86_64', 'AMD64'):
    INSTRUCTION_SETS['_C_avx2'] = ['-march=x86-64-v3']
    INSTRUCTION_SETS['_C_avx512'] = ['-march=x86-64-v4', '-mprefer-vector-width=512']


def cpu_extension(name: str, instruction_set: list[str]) -> Extension:
    return CppExtension(
        f'mmdcn.{name}',
        SOURCES,
        depends=DEPENDS,
        py_limited_api=True,
        define_macros=[('TORCH_TARGET_VERSION', TORCH_TARGET_VERSION)],
        extra_compile_args=[
            '-O3',
            '-Wall',
            '-Wextra',
            '-Wno-unused-parameter',  # in torch's headers
            '-Werror',
            '-g0',
            '-fopenmp-simd',
            '-fno-math-errno',
            '-fno-trapping-math',
            '-fvisibility=hidden',
            *instruction_set,
        ],
    )


def cuda_extension() -> Extension:
    # Its sources are no `sources`: torch would check there for the CUDA that it was built with.
    return Extension('mmdcn._C_cuda', [], depends=[*CUDA_SOURCES, *DEPENDS], py_limited_api=True)


class BuildCore(BuildExtension):
    """Compiles the CUDA library with nvcc itself: torch's own CUDAExtension wants a CUDA build of torch."""

    def build_extension(self, extension: Extension) -> None:
        if extension.name != 'mmdcn._C_cuda':
            super().build_extension(extension)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp, 'cuda')
        objects.mkdir(parents=True, exist_ok=True)
        with ThreadPool() as pool:
            names = pool.map(lambda source: self._compile_cuda(source, objects), CUDA_SOURCES)
        subprocess.check_call(
            [
                'nvcc',
                '--shared',
                *names,
                f'-o={target}',
                *(f'-L={path}' for path in library_paths()),
                '-ltorch_cpu',
                f'-L={self._torch_cuda_stub()}',
                '-Xlinker=--no-as-needed',
                '-ltorch_cuda',
            ]
        )

    def _compile_cuda(self, source: str, folder: Path) -> str:
        """Compile a source for every architecture that has its instructions, and give the object's name."""
        target = str(folder / Path(source).with_suffix('.o').name)
        newest = CUDA_ARCHITECTURES[-1]
        architectures = [
            *(f'-gencode=arch=compute_{arch},code=sm_{arch}' for arch in CUDA_ARCHITECTURES),
            f'-gencode=arch=compute_{newest},code=compute_{newest}',
        ]
        if source.endswith(HOPPER):
            architectures = ['-gencode=arch=compute_90a,code=sm_90a']
        subprocess.check_call(
            [
                'nvcc',
                '-O3',
                '-std=c++20',
                '-c',
                '--threads=0',
                '-Werror=all-warnings',
                '--compress-mode=size',
                *([] if FUSED in source else ['-Xptxas=--warn-on-spills,--warning-as-error']),
                '-Xcompiler=-fPIC,-Wall,-Wno-unknown-pragmas,-fvisibility=hidden',  # unroll is nvcc's own
                f'-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}',
                '-DUSE_CUDA',  # else torch's headers hide its CUDA functions
                *architectures,
                *(f'-isystem={path}' for path in include_paths()),
                source,
                f'-o={target}',
            ]
        )
        return target

    def _torch_cuda_stub(self) -> Path:
        """Make an empty libtorch_cuda: the CUDA library must name it to find its functions there when it is loaded."""
        folder = Path(self.build_temp, 'torch_cuda_stub')
        folder.mkdir(parents=True, exist_ok=True)
        name = 'libtorch_cuda.so'
        subprocess.check_call(
            [
                'nvcc',
                '--shared',
                '--cudart=none',
                '-x=c++',
                '/dev/null',
                f'-Xlinker=-soname={name}',
                f'-o={folder / name}',
            ]
        )
        return folder


def copy_mim(target: Path) -> None:
    """Copy all but the checkpoints, which packages/mmdcn-zoo packs."""
    shutil.rmtree(target, ignore_errors=True)
    for name in MIM:
        if Path(name).is_dir():
            shutil.copytree(name, target / name, ignore=shutil.ignore_patterns('.*', '__pycache__', '*.pth'))
        else:
            shutil.copy(name, target)


def link_mim(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in MIM:
        (target / name).symlink_to(Path('../..', name))


class BuildPackage(build_py):
    """Puts what MIM and mmengine's hub look for into mmdcn/.mim: links in a checkout, copies in a wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            link_mim(Path('mmdcn/.mim'))
        else:
            copy_mim(Path(self.build_lib, 'mmdcn/.mim'))


class BuildWheel(bdist_wheel):
    """Puts the same into the metadata, 90 KB: onedl-mim 0.5.1 looks there, as pip sorts a package's files."""

    def write_wheelfile(self, folder: str, *args: Any, **kwargs: Any) -> None:
        super().write_wheelfile(folder, *args, **kwargs)
        copy_mim(Path(folder, '.mim'))


extensions = [cpu_extension(name, flags) for name, flags in INSTRUCTION_SETS.items()]
if shutil.which('nvcc') and CUDA_SOURCES:
    extensions.append(cuda_extension())
setup(
    ext_modules=extensions,
    cmdclass={'bdist_wheel': BuildWheel, 'build_ext': BuildCore, 'build_py': BuildPackage},
    options={'bdist_wheel': {'py_limited_api': 'cp310'}},
)
