# SPDX-License-Identifier: Apache-2.0
"""Every config builds, and means what its name says; the pages about them say what mmdet has published."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import mmcv.ops
import mmdet
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

from mmdcn import modules

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob('configs/*/*.py') if '_base_' not in path.parts)
COCO = [path for path in CONFIGS if path.stem.endswith('_coco')]
OWN = [path for path in CONFIGS if path not in COCO and path.parent.name != 'coco_tiny']
METAFILES = sorted({path.with_name('metafile.yml') for path in COCO})
# mmdcn's derive from these.
LAYERS = (mmcv.ops.DeformConv2d, mmcv.ops.ModulatedDeformConv2d, mmcv.ops.DeformRoIPool)


def build(cfg: Config) -> torch.nn.Module:
    register_all_modules()
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def find_layers(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


@pytest.mark.parametrize('path', OWN, ids=lambda path: path.stem)
def test_the_deformable_layers_are_those_of_the_name(path: Path) -> None:
    """As in mdconv-group4-c3-c5: DCNv2 with 4 offset groups in the stages c3, c4 and c5, which are layer2 to layer4.

    Or as in dpool: each level's regions are pooled by a layer that predicts its offsets.
    """
    model = build(Config.fromfile(path))
    named = re.search(r'-(d|md)conv(?:-group(\d+))?-c(\d)(?:-c5)?_', path.stem)
    if named is None:
        pools = {'dpool': modules.DeformRoIPoolPack, 'mdpool': modules.ModulatedDeformRoIPoolPack}
        assert list(find_layers(model).values()) == [pools[tag] for tag in path.stem.split('_') if tag in pools] * 4
        return
    kind, groups, first = named.groups(default='1')
    packs = {'d': modules.DeformConv2dPack, 'md': modules.ModulatedDeformConv2dPack}
    assert set(find_layers(model).values()) == {packs[kind]}
    assert {model.get_submodule(name).deform_groups for name in find_layers(model)} == {int(groups)}
    assert {name.split('.')[1] for name in find_layers(model)} == {
        f'layer{stage - 1}' for stage in range(int(first), 6)
    }


@pytest.mark.parametrize('path', COCO, ids=lambda path: path.stem)
def test_a_coco_config_is_that_of_mmdet_with_the_layers_of_mmdcn(path: Path) -> None:
    theirs = build(get_config(f'mmdet::{path.parent.name}/{path.name}'))
    ours = build(Config.fromfile(path))
    shapes, expected = ({name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs))
    assert shapes == expected
    assert find_layers(theirs)
    assert {name: layer.__name__ for name, layer in find_layers(ours).items()} == {
        name: layer.__name__ for name, layer in find_layers(theirs).items()
    }
    assert all(layer.__module__.startswith('mmcv.') for layer in find_layers(theirs).values())
    assert all(layer.__module__.startswith('mmdcn.') for layer in find_layers(ours).values())


def test_the_names_are_unique() -> None:
    assert len({path.stem for path in CONFIGS}) == len(CONFIGS)


@cache
def read_metafile(metafile: Path) -> dict[str, Any]:
    return yaml.safe_load(metafile.read_text())


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_a_metafile_has_the_figures_and_the_checkpoints_of_mmdet(metafile: Path) -> None:
    """For every config of the folder of which mmdet has published any."""
    source = Path(mmdet.__file__).parent / '.mim/configs' / metafile.parent.name / 'metafile.yml'
    published = {
        Path(model['Config']).stem: {key: model[key] for key in ('Config', 'Metadata', 'Results', 'Weights')}
        for model in read_metafile(source)['Models']
        if (ROOT / model['Config']).is_file()
    }
    models = read_metafile(metafile)['Models']
    (collection,) = read_metafile(metafile)['Collections']
    assert {model['Name']: {key: model[key] for key in published[model['Name']]} for model in models} == published
    assert {model['In Collection'] for model in models} == {collection['Name']}
    assert (ROOT / collection['README']).is_file()


def make_row(path: Path, columns: list[str]) -> str:
    """Return the row of a config in the table of its folder's page."""
    models = {Path(model['Config']).stem: model for model in read_metafile(path.with_name('metafile.yml'))['Models']}
    model = models.get(path.stem)
    cells = dict.fromkeys(columns, '-') | {'config': f'[{path.stem}]({path.name})', 'checkpoint': 'not published'}
    if model:
        for result in model['Results']:
            cells.update(result['Metrics'])
        cells['memory (GB)'] = model['Metadata'].get('Training Memory (GB)', '-')
        cells['checkpoint'] = f'[{Path(model["Weights"]).name}]({model["Weights"]})'
    return ' | '.join(str(cells[column]) for column in columns)


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_a_page_has_the_table_of_its_metafile(metafile: Path) -> None:
    lines = metafile.with_name('README.md').read_text().splitlines()
    header, _, *rows = [line.strip('| ') for line in lines if line.startswith('|')]
    expected = {make_row(path, header.split(' | ')) for path in metafile.parent.glob('*.py')}
    assert set(rows) == expected


def test_the_index_names_every_metafile() -> None:
    found = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('configs/*/metafile.yml'))
    assert read_metafile(ROOT / 'model-index.yml')['Import'] == found
