# SPDX-License-Identifier: Apache-2.0
"""The COCO configs on five photographs in COCO's format: they read them, train, resume and test."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from pycocotools.coco import COCO

from mmdcn.datasets import coco_tiny

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/coco_tiny/coco_tiny.py'
ZOO = sorted(f'{path.parent.name}/{path.stem}' for path in ROOT.glob('configs/*/*_coco.py'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has data/coco_tiny."""
    out = tmp_path_factory.mktemp('coco_tiny')
    assert coco_tiny.main(['--out-dir', str(out / 'data/coco_tiny')]) == 0
    return out


@pytest.mark.parametrize(('split', 'count'), [('train2017', 8), ('val2017', 1)])
def test_boxes_outlines_and_stuff_maps_agree(folder: Path, split: str, count: int) -> None:
    data = folder / 'data/coco_tiny'
    coco = COCO(data / f'annotations/instances_{split}.json')
    assert len(coco.anns) == count
    for image in coco.imgs.values():
        objects = coco.imgToAnns[image['id']]
        things = cv2.imread(str(data / f'stuffthingmaps/{split}/{image["file_name"]}'), cv2.IMREAD_UNCHANGED)
        assert things.shape == (image['height'], image['width'])
        assert set(np.unique(things)) - {255} == {item['category_id'] - 1 for item in objects}
        assert np.mean((things != 255) == np.any([coco.annToMask(item) for item in objects], axis=0)) > 0.98
        for item in objects:
            rows, columns = coco.annToMask(item).nonzero()
            left, top, width, height = item['bbox']
            found = [columns.min(), rows.min(), columns.max(), rows.max()]
            np.testing.assert_allclose(found, [left, top, left + width, top + height], atol=1)


def test_the_categories_are_those_of_coco(folder: Path) -> None:
    coco = COCO(folder / 'data/coco_tiny/annotations/instances_val2017.json')
    assert len(coco.cats) == 80
    # On both sides of each gap in COCO's numbers.
    some = {1: 'person', 11: 'fire hydrant', 13: 'stop sign', 28: 'umbrella', 31: 'handbag', 67: 'dining table'}
    some |= {70: 'toilet', 72: 'tv', 82: 'refrigerator', 84: 'book', 90: 'toothbrush'}
    assert {key: coco.cats[key]['name'] for key in some} == some


@pytest.mark.parametrize('name', ZOO)
def test_a_config_reads_the_photographs_small(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv('COCO_CONFIG', name)
    register_all_modules()
    cfg = Config.fromfile(CONFIG)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 4
    assert max(dataset[0]['inputs'].shape) <= 160
    assert cfg.model.backbone.init_cfg == []
    assert Path(cfg.work_dir).name == name.split('/')[1]


def test_a_config_trains_resumes_and_tests(folder: Path) -> None:
    environment = os.environ | {'COCO_CONFIG': 'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco'}
    work_dir = folder / 'work_dirs/coco_tiny' / environment['COCO_CONFIG']
    for command in (
        ['train.py', CONFIG, '--cfg-options', 'train_cfg.max_epochs=1'],
        ['train.py', CONFIG, '--resume'],
        ['test.py', CONFIG, work_dir / 'epoch_2.pth'],
    ):
        tool, *arguments = map(str, command)
        result = subprocess.run(
            [sys.executable, str(ROOT / 'tools' / tool), *arguments],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert ('resumed epoch: 1' in result.stdout + result.stderr) == ('--resume' in arguments)
    assert (work_dir / 'epoch_2.pth').is_file()
