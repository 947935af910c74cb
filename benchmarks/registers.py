# SPDX-License-Identifier: Apache-2.0
"""Print what the assembler gives each CUDA kernel: registers, shared memory, spills. It needs nvcc, but no GPU."""

import re
import subprocess
from pathlib import Path

from tabulate import tabulate
from torch.utils.cpp_extension import include_paths

ARCHITECTURES = (80, 90, 100, 120)  # those of setup.py
SOURCES = sorted((Path(__file__).parents[1] / 'csrc/cuda').glob('*.cu'))
KERNEL = re.compile(
    r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r'.*?Used (\d+) registers[^\n]*?(\d+) bytes smem',
    re.DOTALL,
)


def compile_for(source: Path, architecture: int) -> str:
    """Compile a source and give what ptxas says."""
    definitions = ('-DTORCH_TARGET_VERSION=0x020a000000000000', '-DUSE_CUDA')
    includes = [f'-isystem={path}' for path in include_paths()]
    options = ('-O3', '-std=c++20', f'-arch=sm_{architecture}', '-cubin', '-Xptxas=-v', '-o=/dev/null')
    return subprocess.run(
        ['nvcc', *options, *definitions, *includes, source], check=True, capture_output=True, text=True
    ).stderr


def demangled(name: str) -> str:
    full = subprocess.run(['c++filt', name], check=True, capture_output=True, text=True).stdout
    body = re.search(r'run_block<(.*)>\(', full)
    return (body[1] if body else full.strip()).replace('mmdcn::', '').replace('c10::', '')


def main() -> None:
    rows = [
        [demangled(name), f'sm_{architecture}', *map(int, numbers)]
        for source in SOURCES
        for architecture in ARCHITECTURES
        for name, *numbers in KERNEL.findall(compile_for(source, architecture))
    ]
    heads = ['kernel', 'for', 'stack, bytes', 'spill stores', 'spill loads', 'registers', 'shared memory, bytes']
    print(tabulate(sorted(rows), headers=heads, tablefmt='github'))


if __name__ == '__main__':
    main()
