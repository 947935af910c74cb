# SPDX-License-Identifier: Apache-2.0
"""What the layout of the project promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmdcn

ROOT = Path(__file__).parents[1]
OPERATORS = [path.stem for path in (ROOT / 'csrc/ops').glob('*.cpp')]
FILES = [
    'csrc/ops/{}.h', 'csrc/cpu/{}.cpp', 'csrc/cuda/{}.cu', 'mmdcn/ops/{}.py', 'mmdcn/reference/{}.py',
    'mmdcn/modules/{}.py', 'tests/test_{}.py', 'benchmarks/{}.py',
]  # fmt: skip
TRACKED = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
CORE = [name for name in TRACKED if name.startswith('csrc/')]


@pytest.mark.parametrize('operator', OPERATORS)
@pytest.mark.parametrize('pattern', FILES)
def test_an_operator_has_its_file_in_every_folder(operator: str, pattern: str) -> None:
    assert (ROOT / pattern.format(operator)).is_file()


@pytest.mark.parametrize('operator', OPERATORS)
def test_an_operator_is_public_and_so_is_its_definition(operator: str) -> None:
    assert callable(getattr(mmdcn.ops, operator))
    assert callable(getattr(mmdcn.reference, operator))


@pytest.mark.parametrize('operator', OPERATORS)
@pytest.mark.parametrize('suffix', ['', '_backward'])
@pytest.mark.parametrize('key', ['CPU', 'Meta', 'Autograd', 'FuncTorchBatched'])
def test_an_operator_has_a_kernel_a_fake_a_derivative_and_a_rule_for_vmap(operator: str, suffix: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'mmdcn::{operator}{suffix}', key)


@pytest.mark.parametrize('name', CORE)
def test_the_core_has_no_preprocessor_conditionals(name: str) -> None:
    assert not re.search(r'^\s*#\s*(if|ifdef|ifndef|else|elif)\b', (ROOT / name).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    'name', [name for name in TRACKED if name.endswith(('.py', '.h', '.cpp', '.cu', '.cuh')) and 'configs/' not in name]
)
def test_a_source_file_begins_with_its_licence(name: str) -> None:
    assert (ROOT / name).read_text().lstrip('#/ ').startswith('SPDX-License-Identifier: Apache-2.0')


def test_the_operators_need_torch_alone() -> None:
    absent = 'import sys; sys.modules.update(dict.fromkeys(["mmcv", "mmdet", "mmengine"])); '
    use = 'import mmdcn, torch; mmdcn.ops.deform_conv2d(*map(torch.ones, ((1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1))))'
    subprocess.run([sys.executable, '-c', absent + use], check=True)


def test_mmdcn_imports_neither_mmcv_nor_mmdet_before_they_are_needed() -> None:
    code = 'import sys, mmdcn; print(*{name.split(".")[0] for name in sys.modules})'
    packages = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'mmcv', 'mmdet'} & set(packages)


def test_the_layers_need_nothing_of_the_engine() -> None:
    code = 'import sys, mmdcn.modules; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name for name in loaded if name.startswith('mmdcn.engine')}
