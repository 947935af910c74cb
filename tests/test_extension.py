# SPDX-License-Identifier: Apache-2.0
"""What mmdcn says when its compiled core is not as it should be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mmdcn
from mmdcn._extension import _check_capability

PACKAGE = Path(mmdcn.__file__).parent
BUILD = 'pip install --no-build-isolation .'
# Stands for a CUDA build of torch: it makes mmdcn look for its CUDA library.
CLAIM_CUDA = 'import torch; torch.version.cuda = "13.0"; '
USE = """
import mmdcn, torch
from mmdcn._extension import check_device
print(mmdcn.ops.deform_conv2d(torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1, 1), 7.0)).item())
check_device(torch.device('cuda', 1))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Copy the package without its libraries."""
    ignore = shutil.ignore_patterns('*.so', '.mim', '__pycache__')
    return Path(shutil.copytree(PACKAGE, tmp_path / 'mmdcn', ignore=ignore))


def run(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', code]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def add_cpu_libraries(package: Path) -> None:
    for library in PACKAGE.glob('_C*.so'):
        if library.name != '_C_cuda.abi3.so':
            (package / library.name).symlink_to(library)


def test_a_core_that_was_never_built_is_named_with_the_way_to_build_it(package: Path) -> None:
    result = run(package.parent, 'import mmdcn')
    assert result.returncode != 0
    assert f'ImportError: {package}/_C' in result.stderr
    assert 'is missing' in result.stderr
    assert BUILD in result.stderr


def test_a_core_that_does_not_load_is_named_with_the_reason(package: Path) -> None:
    """The error also says how to build it."""
    for name in ('_C', '_C_avx2', '_C_avx512'):
        (package / f'{name}.abi3.so').write_text('not a library')
    result = run(package.parent, 'import mmdcn')
    assert result.returncode != 0
    assert f'does not load into torch {torch.__version__}: ' in result.stderr
    assert 'file too short' in result.stderr or 'invalid ELF header' in result.stderr
    assert BUILD in result.stderr


def import_with_torch(version: str, package: Path) -> subprocess.CompletedProcess:
    return run(package.parent, f'import torch; torch.__version__ = type(torch.__version__)({version!r}); import mmdcn')


@pytest.mark.parametrize('version', ['2.9.1', '2.9.1+cu130', '1.13.1'])
def test_a_torch_that_is_too_old_is_named_with_the_way_to_upgrade_it(version: str, package: Path) -> None:
    result = import_with_torch(version, package)
    assert result.returncode != 0
    assert 'mmdcn needs torch 2.10 or later' in result.stderr
    assert f'got torch {version}' in result.stderr
    assert "pip install 'torch>=2.10'" in result.stderr


@pytest.mark.parametrize('version', ['2.10.0a0+b4e4ee81d3.nv25.12', '2.10.0.dev20251001+cpu', '2.10.0rc1', '3.0.0'])
def test_a_build_on_the_way_to_the_oldest_torch_is_taken(version: str, package: Path) -> None:
    add_cpu_libraries(package)
    result = import_with_torch(version, package)
    assert result.returncode == 0, result.stderr


def test_without_the_cuda_library_the_cpu_works_and_a_gpu_is_told_why_not(package: Path) -> None:
    add_cpu_libraries(package)
    result = run(package.parent, CLAIM_CUDA + USE)
    assert result.stdout == '7.0\n'
    assert 'RuntimeError: mmdcn cannot run on cuda:1: ' in result.stderr
    assert '_C_cuda.abi3.so is missing' in result.stderr
    assert f'{BUILD}` in a checkout of mmdcn, with nvcc on the PATH' in result.stderr


def test_with_a_broken_cuda_library_the_cpu_works(package: Path) -> None:
    """A call on a GPU raises an error that says why the library does not load."""
    add_cpu_libraries(package)
    (package / '_C_cuda.abi3.so').write_text('not a library')
    result = run(package.parent, CLAIM_CUDA + USE)
    assert result.stdout == '7.0\n'
    assert 'RuntimeError: mmdcn cannot run on cuda:1: ' in result.stderr
    assert '_C_cuda.abi3.so does not load into torch' in result.stderr


@pytest.mark.parametrize('capability', [(7, 0), (7, 5)])
def test_a_gpu_older_than_the_core_is_told_so(capability: tuple[int, int]) -> None:
    text = f'compute capability {capability[0]}.{capability[1]}, and mmdcn is compiled for 8.0'
    with pytest.raises(RuntimeError, match=text):
        _check_capability(torch.device('cuda', 0), capability)


@pytest.mark.parametrize('capability', [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_a_gpu_of_the_core_or_newer_is_accepted(capability: tuple[int, int]) -> None:
    _check_capability(torch.device('cuda', 0), capability)


def test_a_fake_tensor_may_be_on_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        images, offset, weight = (
            torch.zeros(shape, device='cuda') for shape in ((2, 4, 5, 6), (2, 2, 5, 6), (3, 4, 1, 1))
        )
        assert mmdcn.ops.deform_conv2d(images, offset, weight).shape == (2, 3, 5, 6)


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason='this processor has no AVX2')
@pytest.mark.skipif(not hasattr(torch.cpu, 'get_capabilities'), reason='this torch tells too little of a processor')
@pytest.mark.parametrize(
    ('capability', 'lacking', 'library'),
    [
        ('default', '', '_C'),
        ('avx2', '', '_C_avx2'),
        ('avx2', 'avx2', '_C'),
        ('avx2', 'bmi2', '_C'),
        ('avx512', 'avx512_f avx512_bw avx512_cd avx512_dq avx512_vl', '_C_avx2'),  # Haswell, Zen 3
        ('avx512', 'avx512_bw avx512_dq avx512_vl', '_C_avx2'),  # Knights Landing
        ('avx512', 'avx2 avx512_f', '_C'),
    ],
)
def test_no_library_is_loaded_that_the_processor_cannot_run(capability: str, lacking: str, library: str) -> None:
    """Whatever `ATEN_CPU_CAPABILITY` says."""
    code = (
        'import torch\n'
        'features = dict(torch.cpu.get_capabilities())\n'
        f'features.update(dict.fromkeys({lacking.split()}, False))\n'
        'torch.cpu.get_capabilities = lambda: features\n'
        'import mmdcn\n'
        'print(*torch.ops.loaded_libraries)\n'
    )
    result = run(PACKAGE.parent, code, ATEN_CPU_CAPABILITY=capability)
    assert f'/{library}.abi3.so' in result.stdout, result.stderr


PRODUCTS = """
from mmdcn.ops import deform_conv2d
from deform_conv2d_cases import CASES, check_against_reference, draw_grad_output, gradients
for dtype in (torch.float32, torch.bfloat16):
    check_against_reference(CASES['everything at once'].draw(dtype))
torch.set_num_threads(1)
call = CASES['neither'].draw(torch.bfloat16)
with torch.profiler.profile() as profile:
    gradients(deform_conv2d, call, draw_grad_output(call))
print(*{event.name for event in profile.events()})
"""


@pytest.mark.parametrize('name', ['_linear_pointwise', '_reorder_linear_weight'])
def test_an_operator_of_onednn_with_an_argument_more_is_not_called(name: str) -> None:
    """As a later torch may have it: the core would give it fewer arguments than it reads."""
    operators = torch.ops.mkldnn
    if not hasattr(operators, name) or not operators._is_mkldnn_bf16_supported():
        pytest.skip('oneDNN is asked for products in bfloat16 alone')
    grown = (
        'import torch\n'
        f'operator = torch.ops.mkldnn.{name}.default\n'
        'operator._schema = torch._C.parse_schema(str(operator._schema).replace(") ->", ", bool more=False) ->"))\n'
    )
    paths = os.pathsep.join(map(str, (PACKAGE.parent, Path(__file__).parent)))
    ordinary, later = (run(PACKAGE.parent, code + PRODUCTS, PYTHONPATH=paths) for code in ('import torch\n', grown))
    assert ordinary.returncode == later.returncode == 0, ordinary.stderr + later.stderr
    assert f'mkldnn::{name}' in ordinary.stdout.split()
    assert not any(event.startswith('mkldnn::') for event in later.stdout.split())
