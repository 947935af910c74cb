# SPDX-License-Identifier: Apache-2.0
"""What `make gpu-check` and benchmarks/kernels.py make of what they are told: processes, stored figures, listings."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / 'benchmarks'
sys.path.append(str(BENCHMARKS))  # last: its modules have everyday names
MODULES = ('gpu_check', 'gpu_check_page', 'kernel_times', 'kernels')
gpu_check, gpu_check_page, kernel_times, kernels = map(importlib.import_module, MODULES)

MEASURED = json.loads((BENCHMARKS / 'results/gpu-check-ca94760.json').read_text())


# The page


def test_the_page_gives_the_figures_of_the_measured_commit() -> None:
    rows = {row[0]: row[1:] for row in (goal.row(gpu_check_page.loaded(MEASURED)) for goal in gpu_check_page.GOALS)}
    assert rows['bf16 forward / cuDNN, channels_last, c3-c5, batch 16'] == [
        '<= 2', '2.26 (2.8, 2.04, 2.01)', '**not met**'
    ]  # fmt: skip
    assert rows['torchvision / mmdcn, fp16 forward + backward'][1].startswith('10.1 ')
    assert rows['ResNet-50 DCNv2 step, AMP, channels_last / plain'][1] == '1.37'
    assert rows['memory beside the output, fp16 c3, NCHW forward, MiB'][1:] == ['33.5', 'met']
    assert rows['memory beside the output, channels_last, MiB'][1:] == ['0.657', 'met']
    assert rows['deformops / mmdcn, bf16 forward, each shape'][1:] == ['not run', '']


def test_of_each_shape_one_that_misses_the_goal_misses_it() -> None:
    faster_in_the_mean = gpu_check_page.Goal('', lambda groups: [0.9, 5.0], least=1, each=True)
    assert faster_in_the_mean.row({})[2:] == ['0.9, 5', '**not met**']


def test_a_step_that_fails_has_its_last_words_on_the_page() -> None:
    step = {'name': 'tests', 'status': 'late', 'seconds': 9.0, 'counts': {'passed': 3, 'failed': 1}}
    record = {**MEASURED, 'steps': [step | {'failures': ['tests/test_x.py::test_y'], 'tail': ['the last word']}]}
    page = gpu_check_page.page(record)
    assert '3 passed, 1 failed' in page
    assert '- `tests/test_x.py::test_y`' in page
    assert 'the last word' in page


# Steps


def run_step(code: str, limit: float, tmp_path: Path) -> Any:
    step = gpu_check.Step('step', [sys.executable, '-c', code], limit)
    step.start(tmp_path / 'log')
    while not step.done():
        time.sleep(0.05)
    return step


def test_a_late_step_is_stopped_and_keeps_what_it_said(tmp_path: Path) -> None:
    """The processes that it started are stopped too."""
    alive = tmp_path / 'alive'
    child = f'import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()'
    code = f'import subprocess, sys; print("said"); subprocess.run([sys.executable, "-c", {child!r}])'
    step = run_step(code, 1.0, tmp_path)
    assert step.status.startswith('late: stopped after ')
    assert step.tail == ['said']
    time.sleep(3)
    assert not alive.exists()


def test_a_step_that_cannot_start_says_so(tmp_path: Path) -> None:
    step = gpu_check.Step('step', ['/no/such/program'], 1)
    step.start(tmp_path / 'log')
    assert step.done()
    assert step.status.startswith('not started: ')


@pytest.mark.parametrize('workers', [[], ['-n', '2']], ids=['one process', 'workers'])
def test_tests_are_counted_as_they_end(workers: list[str], tmp_path: Path) -> None:
    if workers:
        pytest.importorskip('xdist')
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'tests/test_it.py').write_text(
        'import pytest\n'
        '@pytest.mark.parametrize("name", ["a b", "c - d"])\n'
        'def test_passes(name): pass\n'
        'def test_fails(): assert False\n'
        'def test_is_skipped(): pytest.skip()\n'
        '@pytest.fixture\n'
        'def broken(): 1 / 0\n'
        'def test_has_a_broken_fixture(broken): pass\n'
    )
    command = [sys.executable, '-m', 'pytest', '-vv', '-p', 'no:cacheprovider', *workers, 'tests']
    step = gpu_check.Step('tests', command, 60, cwd=tmp_path)
    step.start(tmp_path / 'log')
    while not step.done():
        time.sleep(0.05)
    assert step.counts == {'passed': 2, 'failed': 1, 'skipped': 1, 'error': 1}
    assert [failure.split()[0] for failure in sorted(step.failures)] == [
        'tests/test_it.py::test_fails',
        'tests/test_it.py::test_has_a_broken_fixture',
    ]
    assert step.status == 'failed with status 1'


def test_errors_in_kernels_of_mmdcn_are_told_from_others() -> None:
    log = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void mmdcn::run_block<mmdcn::SampleColumns<float, 4>>(T1)+0x120
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<512>(T1)+0x30
=========
========= ERROR SUMMARY: 2 errors
"""
    ours, others = gpu_check.sanitizer_errors(log)
    assert len(ours) == len(others) == 1
    assert ours[0].startswith('Invalid __global__ read of size 16 bytes | at void mmdcn::run_block')
    assert others[0].startswith('Uninitialized')


def test_a_folder_without_the_cuda_library_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / 'gpu_check.py', '--site', tmp_path, '--work', tmp_path / 'work']
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f'--site {tmp_path} must hold mmdcn/_C_cuda.abi3.so' in result.stderr


# Kernels

# A loop (0x10) with another in it (0x30), and behind the end a wait that goes back into the inner one.
LISTING = """
	code for sm_90
		Function : _ZN5mmdcn9run_blockINS_13SampleColumnsIfLi4EEEEEvT_
        /*0000*/                   S2R R0, SR_TID.X ;     /* 0x0000000000007919 */
        /*0010*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   MOV R5, RZ ;
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/               @!P1 BRA 0x00d0 ;
        /*0050*/               @P0 LDG.E.128 R12, desc[UR4][R2.64] ;
        /*0060*/                   FFMA R4, R5, R6, R7 ;
        /*0070*/                   F2FP.BF16.F32.PACK_AB R4, R5, R4 ;
        /*0080*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0090*/               @P2 BRA 0x0030 ;
        /*00a0*/               @P3 BRA 0x0010 ;
        /*00b0*/                   STL [R1], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*00e0*/                   BRA 0x0050 ;
        /*00f0*/                   BRA 0x00f0 ;
"""


def test_the_inner_loop_is_found_and_counted_by_class() -> None:
    """Instructions behind the kernel's end belong to it if they branch back into it."""
    [(architecture, name, code)] = kernels.parse_code(LISTING)
    assert (architecture, kernels.demangled([name])[name]) == ('90', 'SampleColumns<float, 4>')
    loop = kernels.inner_loop(code)
    assert [instruction.address for instruction in loop] == [*range(0x30, 0xA0, 0x10), 0xD0, 0xE0]
    assert [instruction.kind for instruction in loop] == [
        'memory', 'control', 'memory', 'FP32', 'conversion', 'integer', 'control', 'memory', 'control'
    ]  # fmt: skip
    assert [instruction.width for instruction in loop if instruction.kind == 'memory'] == [
        'LDG.128',
        'LDG.128',
        'SYNCS',
    ]
    assert sum(instruction.loaded_bytes for instruction in loop) == 2 * kernels.VECTOR_BYTES


@pytest.mark.parametrize(
    ('name', 'kind', 'width'),
    [
        ('HGMMA.64x128x16.F32.BF16', 'tensor', 'HGMMA'),
        ('HMMA.16816.F32.BF16', 'tensor', 'HMMA'),
        ('HADD2.F32', 'conversion', 'HADD2'),
        ('HFMA2.MMA', 'FP16', 'HFMA2'),
        ('I2FP.F32.S32', 'conversion', 'I2FP'),
        ('RED.E.ADD.F32.FTZ.RN.STRONG.GPU', 'memory', 'RED.32'),
        ('RED.E.ADD.F64.RN.STRONG.GPU', 'memory', 'RED.64'),
        ('REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU', 'memory', 'REDG.128'),
        ('REDUX.OR', 'integer', 'REDUX'),
        ('UI2F.U32.RP', 'conversion', 'UI2F'),
        ('LDGSTS.E.BYPASS.128', 'memory', 'LDGSTS.128'),
        ('LDGDEPBAR', 'control', 'LDGDEPBAR'),
        ('LDSM.16.M88.4', 'memory', 'LDSM'),
        ('LDG.E.U16', 'memory', 'LDG.16'),
        ('WARPGROUP.ARRIVE', 'control', 'WARPGROUP'),
        ('PRMT', 'integer', 'PRMT'),
    ],
)
def test_an_instruction_has_its_class(name: str, kind: str, width: str) -> None:
    instruction = kernels.Instruction(0, None, name, '')
    assert (instruction.kind, instruction.width) == (kind, width)


def test_the_times_of_kernels_are_those_of_one_call() -> None:
    numbers = torch.ones(1000)
    times = kernel_times.kernel_times(lambda: numbers.exp(), 'cpu', 3)
    assert 0 < times['aten::exp'] < 1e5
    table = kernel_times.table({'c3': {'one': 2.0}, 'c4': {'one': 1.0, 'other': 5.5}})
    assert [line.split('|')[1:4] for line in table.replace(' ', '').splitlines()[2:]] == [
        ['other', '0.0', '5.5'], ['one', '2.0', '1.0'], ['all', '2.0', '6.5']
    ]  # fmt: skip


# By hand: a warp of 65 to 72 registers takes 2304, a quarter of a multiprocessor holds 16384 / 2304 = 7.
@pytest.mark.parametrize(
    ('architecture', 'registers', 'shared_bytes', 'threads', 'blocks'),
    [
        ('90', 32, 0, 256, 8),  # threads
        ('90', 72, 0, 256, 3),  # registers: 28 warps of 8
        ('90a', 168, 100 << 10, 384, 1),  # registers: 12 warps of 12
        ('80', 32, 80 << 10, 128, 2),  # shared memory: 164 / 81
        ('120', 16, 0, 32, 24),  # blocks
    ],
)
def test_the_blocks_of_a_multiprocessor_are_those_of_its_scarcest_resource(
    architecture: str, registers: int, shared_bytes: int, threads: int, blocks: int
) -> None:
    assert kernels.blocks_per_multiprocessor(architecture, registers, shared_bytes, threads) == blocks


def test_what_cuobjdump_says_of_registers_and_threads_is_read() -> None:
    resources = 'arch = sm_80\n Function f:\n  REG:40 STACK:0 SHARED:4032 LOCAL:0 CONSTANT[0]:688\n'
    assert kernels.parse_resources(resources) == {('80', 'f'): (40, 4032)}
    attributes = (
        'arch = sm_90\n.nv.info.f\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0x80 0x2 0x1 \n'
    )
    assert kernels.parse_threads(attributes) == {('90', 'f'): 256}
