# SPDX-License-Identifier: Apache-2.0
"""Every config builds, and means what its name says."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack

CONFIGS = sorted(path for path in Path(__file__).parents[1].glob('configs/*/*.py') if '_base_' not in path.parts)
COCO = [path for path in CONFIGS if path.parent.name in ('dcn', 'dcnv2')]


def build(cfg: Config) -> torch.nn.Module:
    register_all_modules()
    cfg.model.backbone.init_cfg = None  # no pretrained weights: they would be downloaded
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_deformable_layers_are_those_of_the_name(path: Path) -> None:
    layers = [
        (name, type(layer))
        for name, layer in build(Config.fromfile(path)).named_modules()
        if isinstance(layer, DeformConv2dPack | ModulatedDeformConv2dPack)
    ]
    if 'conv-c3-c5' not in path.stem:
        assert layers == []
        return
    expected = ModulatedDeformConv2dPack if 'mdconv' in path.stem else DeformConv2dPack
    assert {layer for _, layer in layers} == {expected}
    assert {name.split('.')[1] for name, _ in layers} == {'layer2', 'layer3', 'layer4'}


@pytest.mark.parametrize('path', COCO, ids=lambda path: path.stem)
def test_a_coco_config_has_the_parameters_of_that_of_mmdet(path: Path) -> None:
    theirs = get_config(f'mmdet::{path.parent.name}/{path.name}')
    ours, expected = (
        {name: value.shape for name, value in build(cfg).state_dict().items()}
        for cfg in (Config.fromfile(path), theirs)
    )
    assert ours == expected


def test_the_names_are_unique() -> None:
    assert len({path.stem for path in CONFIGS}) == len(CONFIGS)
