# SPDX-License-Identifier: Apache-2.0
"""packages/mmdcn-mmcv: what it installs, and mmcv with it, as it is where nothing of it is compiled."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from zipfile import ZipFile

import mmcv
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'packages/mmdcn-mmcv'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for modules: the installed mmcv without what is compiled, and the file of mmdcn-mmcv."""
    folder = tmp_path / 'site/mmcv'
    folder.mkdir(parents=True)
    for path in Path(mmcv.__file__).parent.iterdir():
        if not path.name.startswith(('_ext', '__pycache__')):
            (folder / path.name).symlink_to(path)
    shutil.copy(PACKAGE / 'mmcv/_ext.py', folder)
    return folder.parent


def run(code: str, site: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (site, ROOT, ROOT / 'tests')))}
    return subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_one_file(tmp_path: Path) -> None:
    source = shutil.copytree(PACKAGE, tmp_path / 'source', ignore=shutil.ignore_patterns('build', '*.egg-info'))
    build = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, source]
    subprocess.run(build, check=True)
    names = ZipFile(next(tmp_path.glob('mmdcn_mmcv-*-py3-none-any.whl'))).namelist()
    assert [name for name in names if '.dist-info/' not in name] == ['mmcv/_ext.py']


def test_a_compiled_module_goes_before_the_file(site: Path) -> None:
    folder = site / 'mmcv'
    assert PathFinder.find_spec('mmcv._ext', [str(folder)]).origin == str(folder / '_ext.py')
    for suffix in EXTENSION_SUFFIXES:
        compiled = folder / f'_ext{suffix}'
        compiled.touch()
        assert PathFinder.find_spec('mmcv._ext', [str(folder)]).origin == str(compiled)
        compiled.unlink()


ON_MMDCN = """
import mmcv.ops, mmcv._ext, torch
from mmcv.utils import collect_env
from mmdcn.openmmlab import mmcv_ext
assert mmcv._ext is mmcv_ext
boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12]]), torch.tensor([0.1, 0.2, 0.3])
print(mmcv.ops.nms(boxes, scores, 0.5)[1].tolist())
print(collect_env()['MMCV Compiler'])
mmcv.ops.roi_align_rotated(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6), (2, 2), 1.0)
"""


def test_mmcv_runs_on_it_and_says_what_it_lacks(site: Path) -> None:
    result = run(ON_MMDCN, site)
    assert result.stdout.splitlines() == ['[2, 1]', f'not compiled; operators of mmdcn {_version()}'], result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith('NotImplementedError: mmdcn has no roi_align_rotated_forward') and 'pip install' in last


def test_the_parity_check_refuses_to_compare_mmdcn_with_itself(site: Path) -> None:
    """It names the environment that has mmcv's own operators."""
    tool = str(ROOT / 'tools/analysis_tools/check_parity.py')
    result = run(f"import runpy, sys; sys.argv = ['', 'any.py']; runpy.run_path({tool!r}, run_name='__main__')", site)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: mmcv runs on mmdcn's operators here") and '.venv-mmcv/bin/python runs' in last


def _version() -> str:
    from mmdcn import __version__

    return __version__


TRAINING = """
import small_detectors as small
from mmengine.config import ConfigDict
for config in (small.fcos_config, small.faster_rcnn_config):
    model = small.build(ConfigDict(config(layer='DCNv2')))
    losses, _ = model.parse_losses(model(**model.data_preprocessor(small.batch(), True), mode='loss'))
    losses.backward()
    found = model.eval().test_step(small.batch())
    print('found', len(found[0].pred_instances), type(model.backbone.layer2[0].conv2).__module__)
"""


def test_unchanged_detectors_train_and_test_on_it(site: Path) -> None:
    result = run(TRAINING, site)
    found = [line.split() for line in result.stdout.splitlines() if line.startswith('found')]
    assert [words[2] for words in found] == ['mmcv.ops.modulated_deform_conv'] * 2, result.stderr
    assert all(int(words[1]) > 0 for words in found)
