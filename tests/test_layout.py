# SPDX-License-Identifier: Apache-2.0
"""What the layout of the project promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import Registry

import mmdcn
from mmdcn import registry

ROOT = Path(__file__).parents[1]
OPERATORS = [path.stem for path in (ROOT / 'csrc/ops').glob('*.cpp')]
FILES = [
    'csrc/ops/{}.h', 'csrc/cpu/{}.cpp', 'csrc/cuda/{}.cu', 'mmdcn/ops/{}.py', 'mmdcn/reference/{}.py',
    'tests/test_{}.py', 'benchmarks/{}.py',
]  # fmt: skip
# Which have neither parameters nor a gradient, and so no layer and no derivative.
LAYERLESS = {'nms'}
LAYERS = sorted({*OPERATORS} - LAYERLESS)
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


@pytest.mark.parametrize('operator', LAYERS)
@pytest.mark.parametrize('folder', ['nn', 'modules'])
def test_an_operator_with_a_derivative_has_a_layer(operator: str, folder: str) -> None:
    assert (ROOT / f'mmdcn/{folder}/{operator}.py').is_file()


@pytest.mark.parametrize('operator', OPERATORS)
@pytest.mark.parametrize('key', ['CPU', 'Meta'])
def test_an_operator_has_a_kernel_and_a_fake(operator: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'mmdcn::{operator}', key)


@pytest.mark.parametrize('operator', LAYERS)
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


def test_every_registered_name_and_every_package_is_an_attribute_of_mmdcn() -> None:
    registries = [value for value in vars(registry).values() if isinstance(value, Registry) and value.scope == 'mmdcn']
    registered: dict[str, type] = {}
    for each in registries:
        each.import_from_location()
        registered |= each.module_dict
    assert len(registries) == 6 and len(registered) > 15
    for name, value in registered.items():
        assert getattr(mmdcn, name) is value, name
        assert name in mmdcn.__all__
    for name in mmdcn.__all__:
        assert getattr(mmdcn, name) is not None


WITHOUT_MMDET = """
import sys
sys.modules['mmdet'] = None  # as where it is not installed
import mmcv.ops, mmdcn, torch
from mmcv.cnn import build_conv_layer
from torch import nn
layer = build_conv_layer(dict(type='mmdcn.DCNv2'), 4, 6, kernel_size=3)
assert type(layer) is mmdcn.DCNv2
theirs = mmcv.ops.DeformConv2dPack(6, 4, 3)
assert mmdcn.convert_model(theirs) is theirs and type(theirs) is mmdcn.DCN
model = mmdcn.fuse_conv_bn(nn.Sequential(layer, nn.BatchNorm2d(6), theirs).eval())
assert type(model[1]) is nn.Identity
with mmdcn.visualization.SamplingRecorder(model) as recorder:
    model(torch.zeros(1, 4, 8, 9))
assert len(recorder.layers) == 2
from mmengine.optim import build_optim_wrapper
build_optim_wrapper(model, dict(constructor='mmdcn.DCNOptimWrapperConstructor', optimizer=dict(type='SGD', lr=1.0)))
"""


def test_without_mmdet_the_layers_and_conversions_work() -> None:
    subprocess.run([sys.executable, '-c', WITHOUT_MMDET], check=True)


OF_MMSEG = """
import sys
sys.modules['mmdet'] = None
from mmengine.registry import init_default_scope
from mmseg.models.backbones import ResNetV1c
init_default_scope('mmseg')
backbone = ResNetV1c(depth=50, base_channels=4, dcn=dict(type='mmdcn.DCNv2'), stage_with_dcn=(0, 0, 0, 1))
print(type(backbone.layer4[0].conv2))
"""


def test_without_mmdet_a_model_of_mmseg_has_the_layers() -> None:
    pytest.importorskip('mmseg')
    result = subprocess.run([sys.executable, '-c', OF_MMSEG], check=True, capture_output=True, text=True)
    assert 'mmdcn.modules.deform_conv2d.ModulatedDeformConv2dPack' in result.stdout


def test_without_mmdet_what_derives_from_it_says_so() -> None:
    code = "import sys; sys.modules['mmdet'] = None; import mmdcn; mmdcn.ResNet"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert 'mmdet' in result.stderr.splitlines()[-1]
