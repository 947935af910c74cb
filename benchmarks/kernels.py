# SPDX-License-Identifier: Apache-2.0
"""Print the cost of each CUDA kernel: registers, spills, shared memory, resident blocks, inner-loop instructions.

This needs no GPU, but cuobjdump and nvdisasm from a CUDA toolkit or from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm. Every instruction in the loop is counted once, on both sides of a branch.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import networkx
from tabulate import tabulate

LIBRARY = Path(__file__).parents[1] / 'mmdcn/_C_cuda.abi3.so'
VECTOR_BYTES = 16
# Limits of a multiprocessor: KiB of shared memory, threads, blocks (CUDA C++ Programming Guide, compute capabilities).
LIMITS = {
    '75': (64, 1024, 16),
    '80': (164, 2048, 32),
    '86': (100, 1536, 16),
    '87': (164, 1536, 16),
    '89': (100, 1536, 24),
    '90': (228, 2048, 32),
    '100': (228, 2048, 32),
    '103': (228, 2048, 32),
    '120': (100, 1536, 24),
    '121': (100, 1536, 24),
}
REGISTERS = 65536  # per multiprocessor
SYSTEM_SHARED = 1024  # bytes that the system reserves per block; binaries for sm_90 and later include them
LAUNCH_SHARED = {  # dynamic shared memory in bytes by kernel: Form::shared_bytes for nine taps
    r'\bMma<.*, 128, 256, 64, 64, 2, 1>': 135168,
    r'\bMma<.*, 64, 128, 32, 64, 3, 2>': 83968,
    r'\bMma<.*, 64, 64, 32, 32, 3, 3>': 59392,
    r'\bWgmma<.*, 1, 64, 4, 3, 0>': 51520,
    r'\bWgmma<.*, 2, 256, 3, 1, 0>': 135728,
    r'\bWgmma<.*, 3, 128, 5, 1, 0>': 138064,
    r'\bWgmma<.*, 1, 64, 3, 3, 2048>': 51504,
    r'\bWgmma<.*, 2, 256, 3, 1, 2048>': 152112,
    r'\bWgmma<.*, 3, 128, 5, 1, 2048>': 162640,
}
CLASSES = {  # the first match counts
    'control': r'BRA|BRX|JMP|EXIT|BSSY|BSYNC|BREAK|BAR|WARPSYNC|CALL|RET|NOP|DEPBAR|LDGDEPBAR|YIELD|NANOSLEEP|WARPGROUP'
    r'|ERRBAR|MEMBAR|FENCE|ELECT|VOTE|ACQBULK|UCGABAR',
    'conversion': r'U?F2|U?I2F|FRND|I2IP?\b|HADD2\.(BF16_V2\.)?F32',
    'tensor': r'[HIQODB]?G?MMA\b|UTC\w*MMA',
    'memory': r'LD|ST|ATOM|RED(?!UX)|UBLKCP|UTMA|SYNCS|CCTL|SULD|SUST|TEX|UBLKRED',
    'FP32': r'FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FSET\b|FCHK|MUFU|FSWZADD|FADD2|FMUL2|FFMA2',
    'FP16': r'H(ADD|MUL|FMA|SET|SETP|MNMX)2',
    'FP64': r'D(ADD|MUL|FMA|SETP)',
}
FUNCTION = re.compile(r'Function\s*:?\s*([\w$.]+):?\s*$')
ARCHITECTURE = re.compile(r'(?:arch = |code for )sm_(\w+)')
RESOURCES = re.compile(r'REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)')
INSTRUCTION = re.compile(r'/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);')


@dataclass(frozen=True)
class Instruction:
    """A line of the disassembly."""

    address: int
    guard: str | None  # the predicate that guards it
    name: str  # with modifiers, such as LDG.E.128
    operands: str

    @property
    def kind(self) -> str:
        """The class in CLASSES; 'integer' for all others: integer arithmetic, register moves and bit operations."""
        return next((kind for kind, names in CLASSES.items() if re.match(names, self.name)), 'integer')

    @property
    def width(self) -> str:
        """The operation, with its width in bits if it accesses memory: LDG.128."""
        operation, *modifiers = self.name.split('.')
        if not re.match(r'(LD|ST|ATOM|RED)(?!SM|GDEPBAR|UX)', operation):
            return operation
        named = (re.fullmatch(r'[USF]?(8|16|64|128|32x4)', modifier) for modifier in modifiers)
        bits = next((found[1] for found in named if found), '32')
        return f'{operation}.{bits.replace("32x4", "128")}'

    @property
    def loaded_bytes(self) -> int:
        """The bytes of device memory that it reads per thread."""
        operation, _, bits = self.width.partition('.')
        return int(bits) // 8 if operation in ('LDG', 'LD', 'LDGSTS') else 0

    @property
    def target(self) -> int | None:
        """The address that it branches to."""
        found = re.search(r'(?:^|[ ,(])0x([0-9a-f]+)\)?\s*$', self.operands) if self.name.startswith('BRA') else None
        return int(found[1], 16) if found else None

    @property
    def ends_path(self) -> bool:
        """Whether execution never continues with the next instruction."""
        bare = self.guard is None and ',' not in self.operands
        return bare and (self.name == 'BRA' or self.name.split('.')[0] in ('EXIT', 'RET', 'BRX', 'JMP'))


@dataclass
class Kernel:
    """The resources of a kernel, and the instructions of its inner loop."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int  # static and dynamic
    threads: int  # maximum per block
    blocks: int  # resident per multiprocessor
    spills: int  # instructions that store or load a spilled register
    vectors: float  # 16-byte vectors that a thread loads per iteration of the inner loop; 0 if it loads none
    classes: dict[str, int] = field(default_factory=dict)  # instructions of the loop by class
    widths: dict[str, int] = field(default_factory=dict)  # memory instructions of the loop by width

    @property
    def per_vector(self) -> float:
        return sum(self.classes.values()) / self.vectors if self.vectors else 0.0


def natural_loops(code: list[Instruction]) -> list[set[int]]:
    """Return the instruction indices of each natural loop: all that reach the back edge without passing the head."""
    graph = networkx.DiGraph()
    index = {instruction.address: i for i, instruction in enumerate(code)}
    graph.add_nodes_from(range(len(code)))
    for i, instruction in enumerate(code):
        if instruction.target in index:
            graph.add_edge(i, index[instruction.target])
        if not instruction.ends_path and i + 1 < len(code):
            graph.add_edge(i, i + 1)
    reached = networkx.descendants(graph, 0) | {0}
    graph = graph.subgraph(reached)
    dominators = networkx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for tail, head in graph.edges:
        if tail != head and dominates(head, tail, dominators):
            rest = graph.subgraph(reached - {head})
            bodies.setdefault(head, {head}).update({tail}, networkx.ancestors(rest, tail))
    return list(bodies.values())


def dominates(head: int, node: int | None, dominators: dict[int, int | None]) -> bool:
    """Return whether every path to the node passes through the head."""
    while node is not None and node > 0 and node != head:
        node = dominators.get(node)
    return node == head


def inner_loop(code: list[Instruction]) -> list[Instruction]:
    """Return the innermost loop that loads the most bytes, in whole vectors first; the kernel if no loop loads."""

    def loaded(loop: set[int]) -> tuple[int, int]:
        sizes = [code[i].loaded_bytes for i in loop]
        return sum(size for size in sizes if size == VECTOR_BYTES), sum(sizes)

    loading = [loop for loop in natural_loops(code) if loaded(loop) > (0, 0)]
    innermost = [loop for loop in loading if not any(other < loop for other in loading)]
    best = max(innermost, key=loaded, default=None)
    return code if best is None else [code[i] for i in sorted(best)]


def blocks_per_multiprocessor(architecture: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Count the blocks that fit on a multiprocessor, as the CUDA occupancy calculator does."""
    shared_kib, most_threads, most_blocks = LIMITS[re.sub(r'\D', '', architecture)]
    warps = -(-threads // 32)
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // registers_of_warp * 4 // warps  # allocated per quarter, in whole warps
    shared = -(-(shared_bytes + SYSTEM_SHARED) // 128) * 128
    by_shared = shared_kib * 1024 // shared if shared else most_blocks
    return min(most_blocks, most_threads // (warps * 32), by_registers, by_shared)


def parse_code(listing: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Yield architecture, name and instructions of each function that cuobjdump lists."""
    architecture, name, code = '', '', []
    for line in listing.splitlines():
        if found := ARCHITECTURE.search(line):
            architecture = found[1]
        elif found := FUNCTION.search(line):
            if code:
                yield code_of(name, code)
            name, code = f'{architecture} {found[1]}', []
        elif found := INSTRUCTION.search(line):
            code.append(Instruction(int(found[1], 16), found[2], found[3], found[4].strip()))
    if code:
        yield code_of(name, code)


def code_of(name: str, code: list[Instruction]) -> tuple[str, str, list[Instruction]]:
    architecture, _, function = name.partition(' ')
    return architecture, function, code


def parse_resources(listing: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Return registers and bytes of shared memory by architecture and function."""
    found, architecture, name = {}, '', ''
    for line in listing.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := FUNCTION.search(line):
            name = match[1]
        elif match := RESOURCES.search(line):
            found[architecture, name] = int(match[1]), int(match[3])
    return found


def parse_threads(listing: str) -> dict[tuple[str, str], int]:
    """Return the maximum threads per block by architecture and function, for functions with launch bounds."""
    found, architecture, name, bound = {}, '', '', False
    for line in listing.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := re.match(r'\.nv\.info\.(\S+)', line):
            name = match[1]
        elif 'EIATTR_' in line:
            bound = 'EIATTR_MAX_THREADS' in line or 'EIATTR_REQNTID' in line
        elif bound and (match := re.search(r'Value:\s+0x(\w+) 0x(\w+) 0x(\w+)', line)):
            x, y, z = (int(size, 16) for size in match.groups())
            found[architecture, name] = x * y * z
    return found


def tool() -> str:
    """Find cuobjdump on the PATH or in its Python package, with nvdisasm beside it."""
    spec = importlib.util.find_spec('nvidia')
    folders = [Path(folder, 'cu13/bin') for folder in (spec.submodule_search_locations if spec else ()) or ()]
    path = os.pathsep.join([os.environ['PATH'], *map(str, folders), '/usr/local/cuda/bin'])
    found = shutil.which('cuobjdump', path=path)
    if found is None:
        raise SystemExit('cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm')
    return found


def dump(what: str, binary: Path) -> str:
    cuobjdump = tool()
    env = {**os.environ, 'PATH': f'{Path(cuobjdump).parent}{os.pathsep}{os.environ["PATH"]}'}
    result = subprocess.run([cuobjdump, what, binary], capture_output=True, text=True, env=env, check=False)
    if result.returncode:
        raise SystemExit(f'{cuobjdump} {what} {binary}: {result.stderr.strip()}')
    return result.stdout


def demangled(names: list[str]) -> dict[str, str]:
    full = subprocess.run(['c++filt'], check=True, capture_output=True, text=True, input='\n'.join(names)).stdout
    return {name: short(text) for name, text in zip(names, full.splitlines(), strict=True)}


def short(name: str) -> str:
    """Remove what all kernels share: return type, arguments, launcher, namespaces and types of integer parameters."""
    name = re.sub(r'\((?:anonymous namespace)\)::|mmdcn::|c10::|^void ', '', name)
    name = re.sub(r'\((?:unsigned )?(?:int|long|bool)\)', '', name)
    name = re.sub(r'\([^()]*\)$', '', name)
    body = re.fullmatch(r'run_block<(.*?) ?>', name)
    return body[1] if body else name


def kernels(binary: Path, pattern: str, dynamic: dict[str, int]) -> list[Kernel]:
    resources, threads = parse_resources(dump('-res-usage', binary)), parse_threads(dump('-elf', binary))
    listed = [entry for entry in parse_code(dump('-sass', binary)) if entry[0]]
    names = demangled([name for _, name, _ in listed])
    found = []
    for architecture, name, code in listed:
        if not re.search(pattern, names[name]):
            continue
        registers, shared = resources.get((architecture, name)) or resources['', name]  # a cubin names none
        if int(re.sub(r'\D', '', architecture)) >= 90:
            shared = max(shared - SYSTEM_SHARED, 0)
        shared += next((size for key, size in dynamic.items() if re.search(key, names[name])), 0)
        block = threads.get((architecture, name)) or threads.get(('', name), 1024)
        loop = inner_loop(code)
        found.append(
            Kernel(
                names[name],
                f'sm_{architecture}',
                registers,
                shared,
                block,
                blocks_per_multiprocessor(architecture, registers, shared, block),
                sum(instruction.name.startswith(('LDL', 'STL')) for instruction in code),
                sum(instruction.loaded_bytes for instruction in loop) / VECTOR_BYTES,
                dict(Counter(instruction.kind for instruction in loop)),
                dict(Counter(instruction.width for instruction in loop if instruction.kind == 'memory')),
            )
        )
    return sorted(found, key=lambda kernel: (kernel.name, len(kernel.architecture), kernel.architecture))


def table(found: list[Kernel]) -> str:
    kinds = [kind for kind in ('integer', *CLASSES) if any(kind in kernel.classes for kernel in found)]
    heads = [
        'kernel',
        'for',
        'registers',
        'spills',
        'shared, bytes',
        'threads',
        'blocks',
        '16-byte vectors of the loop',
    ]
    lines = []
    for k in found:
        per = [f'{k.classes.get(kind, 0) / k.vectors:.1f}' if k.vectors else '' for kind in kinds]
        widths = ', '.join(f'{count} {width}' for width, count in sorted(k.widths.items()))
        cells = (k.registers, k.spills, k.shared_bytes, k.threads, k.blocks, f'{k.vectors:g}', f'{k.per_vector:.1f}')
        lines.append([k.name, k.architecture, *cells, *per, widths])
    heads += ['instructions per vector', *kinds, "memory, in the loop's one pass"]
    return tabulate(lines, headers=heads, tablefmt='github', disable_numparse=True)


def tables(found: dict[str, list[Kernel]]) -> str:
    return '\n\n'.join(f'{binary}:\n\n{table(rows)}' for binary, rows in found.items())


def store(found: dict[str, list[Kernel]], folder: Path) -> None:
    """Write kernels-ARCHITECTURE.md and .json; the files for sm_90 also contain the kernels for sm_90a."""
    by_architecture: dict[str, dict[str, list[Kernel]]] = {}
    for binary, rows in found.items():
        for kernel in rows:
            by_architecture.setdefault(kernel.architecture.rstrip('a'), {}).setdefault(binary, []).append(kernel)
    for architecture, own in by_architecture.items():
        path = folder / f'kernels-{architecture}'
        unpadded = re.sub(r'([ -])\1+', r'\1', tables(own))
        path.with_suffix('.md').write_text(f'{unpadded}\n')
        lines = [json.dumps({'binary': binary, **asdict(kernel)}) for binary, rows in own.items() for kernel in rows]
        path.with_suffix('.json').write_text('[\n' + ',\n'.join(lines) + '\n]\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        'binary', type=Path, nargs='*', default=[LIBRARY], help='libraries or cubins; by default the built CUDA library'
    )
    parser.add_argument('--kernels', default='', help='regular expression for the names of the kernels to show')
    parser.add_argument(
        '--dynamic',
        nargs='+',
        default=[],
        metavar='REGEX=BYTES',
        help="dynamic shared memory of kernels with matching names; that of mmdcn's kernels for nine taps is built in",
    )
    parser.add_argument('--out', type=Path, help='folder for kernels-ARCHITECTURE.md and .json')
    args = parser.parse_args()
    dynamic = LAUNCH_SHARED | {key: int(size) for key, _, size in (item.rpartition('=') for item in args.dynamic)}
    found = {binary.name: kernels(binary, args.kernels, dynamic) for binary in args.binary}
    print(tables(found))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        store(found, args.out)


if __name__ == '__main__':
    main()
