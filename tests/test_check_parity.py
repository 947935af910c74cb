# SPDX-License-Identifier: Apache-2.0
"""tools/analysis_tools/check_parity.py, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.mmcv_ops

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools/analysis_tools/check_parity.py'
SMALL = ROOT / 'configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
# One for each way in which a detector comes by its deformable convolutions.
ZOO = {
    'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco': 13,
    'dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco': 13,
    'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco': 3,
    'fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco': 13 + 2 * 5,
    'reppoints/reppoints-moment_r101-dconv-c3-c5_fpn-gn_head-gn_2x_coco': 30 + 2 * 5,
    'tood/tood_r101-dconv-c3-c5_fpn_ms-2x_coco': 30 + (2 + 1) * 5,
    'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco': 13 + (2 + 2) * 5,
}


def check(*configs: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, configs)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.fixture(scope='module')
def zoo() -> subprocess.CompletedProcess:
    return check(*(ROOT / 'configs' / f'{name}.py' for name in ZOO))


def test_the_zoo_gives_the_outputs_that_it_gives_on_mmcv(zoo: subprocess.CompletedProcess) -> None:
    assert zoo.returncode == 0, zoo.stderr
    differences = [float(found) for found in re.findall(r'\| ([\d.e+-]+) +\| yes \|', zoo.stdout)]
    assert len(differences) == 2 * 3 + 5 * 2  # features, and rpn_head and roi_head or bbox_head
    # Far below the tool's tolerance: double precision, magnified by the layers.
    assert max(differences) < 1e-8


def test_each_model_runs_its_own_operators(zoo: subprocess.CompletedProcess) -> None:
    """In every level of the pyramid, in modules and in the function that TOOD calls."""
    names = re.findall(r'^(\S+): the same \d+ parameters', zoo.stdout, re.M)
    calls = re.findall(r'^\| on mmdcn .* (\d+) mmdcn::deform_conv2d +\|$', zoo.stdout, re.M)
    assert dict(zip(names, map(int, calls), strict=True)) == {Path(name).name: count for name, count in ZOO.items()}


LARGER = """
from mmdcn.modules import ModulatedDeformConv2dPack as Layer
forward = Layer.forward
Layer.forward = lambda self, x: 1.001 * forward(self, x)
"""
RICHER = """
from mmdcn.modules import ModulatedDeformConv2dPack as Layer
init = Layer.__init__
def __init__(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.register_buffer('extra', self.weight.detach()[0])
Layer.__init__ = __init__
"""
WRONG = {
    'larger': f"_base_ = '{SMALL}'\ncustom_imports = dict(imports=['larger'])\n",
    'richer': f"_base_ = '{SMALL}'\ncustom_imports = dict(imports=['richer'])\n",
    'plain': f"_base_ = '{SMALL.with_name(SMALL.name.replace('-mdconv-c3-c5', ''))}'\n",
    'partial': "_base_ = 'mmdet::vfnet/vfnet_r50_fpn_1x_coco.py'\ncustom_imports = dict(imports=['mmdcn.overrides'])\n",
}


@pytest.fixture(scope='module')
def wrong(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    folder = tmp_path_factory.mktemp('wrong')
    (folder / 'larger.py').write_text(LARGER)
    (folder / 'richer.py').write_text(RICHER)
    configs = [folder / f'{name}_config.py' for name in WRONG]
    for path, text in zip(configs, WRONG.values(), strict=True):
        path.write_text(text)
    return check(*configs, PYTHONPATH=str(folder))


def test_it_fails_if_a_config_has_no_parity(wrong: subprocess.CompletedProcess) -> None:
    assert wrong.returncode == 1
    failed = re.findall(r'(\w+)_config\.py', wrong.stderr.splitlines()[-1])
    assert failed == list(WRONG)


@pytest.mark.parametrize(
    'message',
    [
        r'larger_config.py: outputs differ by more than 0.0001 of the largest value',
        r'backbone.layer2.0.conv2.extra: nothing on mmcv, \(64, 3, 3\) on mmdcn',
        r'the model on mmcv ran 0 deformable operators, the one on mmdcn 0: the numbers should be',
        r"the one on mmdcn \{'DeformConv2dFunction': 10\}: each should run its own .*mmdcn.overrides_everywhere",
    ],
    ids=['outputs', 'parameters', 'no deformable layer', 'layers left on mmcv'],
)
def test_it_says_what_differs(wrong: subprocess.CompletedProcess, message: str) -> None:
    assert re.search(message, wrong.stderr)
