# SPDX-License-Identifier: Apache-2.0
"""The RoI layers and their extractor: mmcv's to a user and to mmdet, on mmdcn's operator, on a CPU too."""

from pathlib import Path
from typing import Any

import mmcv.ops
import pytest
import torch
from mmdet.models.roi_heads import SingleRoIExtractor as MMDetSingleRoIExtractor
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn

import mmdcn
from mmdcn import modules

ROOT = Path(__file__).parents[1]
PACKS = ['DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack']
LAYERS = ['DeformRoIPool', *PACKS]
SETTINGS: dict[str, Any] = dict(output_size=(2, 3), output_channels=4, deform_fc_channels=5, spatial_scale=0.5)


def draw_rois(count: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    corners = 30 * torch.rand(count, 2, 2, generator=generator, dtype=torch.float64).sort(dim=1).values
    return torch.cat([torch.arange(count).remainder(2)[:, None], corners.flatten(1)], 1)


def draw_input() -> Tensor:
    return torch.randn(2, 4, 13, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def randomised(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.double()


def pool_by_roi_align(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """Stand for mmcv's operator, which has no kernel for CPUs: each bin of RoIAlign, from a moved region."""

    def align(rois: Tensor) -> Tensor:
        return mmcv.ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, 'avg', True)

    if offset is None:
        return align(rois)
    output = align(rois).clone()
    size = (rois[:, 3:] - rois[:, 1:3]).repeat(1, 2)
    for row in range(output_size[0]):
        for column in range(output_size[1]):
            moved = rois[:, 1:] + gamma * size * offset[:, :, row, column].detach().repeat(1, 2)
            output[:, :, row, column] = align(torch.cat([rois[:, :1], moved], 1))[:, :, row, column]
    return output


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('name', PACKS)
def test_a_random_state_dict_gives_what_mmcvs_code_gives_on_roi_align(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = randomised(getattr(mmcv.ops, name)(**SETTINGS))
    ours = getattr(modules, name)(**SETTINGS).double()
    ours.load_state_dict(theirs.state_dict())
    monkeypatch.setitem(type(theirs).forward.__globals__, 'deform_roi_pool', pool_by_roi_align)
    torch.testing.assert_close(ours(draw_input(), draw_rois()), theirs(draw_input(), draw_rois()))


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('name', PACKS)
def test_mmcv_has_no_kernel_for_cpus(name: str) -> None:
    layer = getattr(mmcv.ops, name)(**SETTINGS).double()
    with pytest.raises(RuntimeError, match='implementation for device cpu not found'):
        layer(draw_input(), draw_rois())


@pytest.mark.parametrize('name', PACKS)
def test_every_parameter_of_a_packed_layer_learns(name: str) -> None:
    layer = randomised(getattr(modules, name)(**SETTINGS))
    layer(draw_input(), draw_rois()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.mmcv_ops
@pytest.mark.parametrize(('name', 'factor'), zip(PACKS, [1, 0.5], strict=True))
def test_a_new_layer_is_roi_align_or_half_of_it(name: str, factor: float) -> None:
    layer = getattr(modules, name)(**SETTINGS).double()
    expected = mmcv.ops.roi_align(draw_input(), draw_rois(), (2, 3), 0.5, 0, 'avg', True)
    torch.testing.assert_close(layer(draw_input(), draw_rois()), factor * expected)


@pytest.mark.parametrize('name', PACKS)
def test_no_region_gives_no_bins(name: str) -> None:
    layer = getattr(modules, name)(**SETTINGS).double()
    output = layer(draw_input().requires_grad_(), draw_rois(0))
    assert output.shape == (0, 4, 2, 3)
    output.sum().backward()


@pytest.mark.parametrize('name', PACKS)
def test_it_trains_under_autocast(name: str) -> None:
    layer = randomised(getattr(modules, name)(**SETTINGS)).float()
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(draw_input().float(), draw_rois().float())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize('name', PACKS)
def test_another_number_of_channels_is_refused_by_name(name: str) -> None:
    layer = getattr(modules, name)(**SETTINGS).double()
    message = r'^input must have 4 channels, the output_channels of the layer, got shape \[2, 3, 13, 17\]$'
    with pytest.raises(ValueError, match=message):
        layer(draw_input()[:, :3], draw_rois())


# In mmdet


def extractor(cls: type, name: Any) -> nn.Module:
    settings = {key: value for key, value in SETTINGS.items() if key != 'spatial_scale'}
    if 'Pack' not in name:
        settings = dict(output_size=(2, 3))
    return cls(roi_layer=dict(type=name, **settings), out_channels=4, featmap_strides=[4, 8])


@pytest.mark.parametrize('prefix', ['', 'mmdcn.'])
@pytest.mark.parametrize('name', LAYERS)
def test_the_extractor_finds_the_layers_by_their_names(name: str, prefix: str) -> None:
    layers = extractor(mmdcn.SingleRoIExtractor, prefix + name).roi_layers
    assert [type(layer) for layer in layers] == [getattr(modules, name)] * 2
    assert [layer.spatial_scale for layer in layers] == [1 / 4, 1 / 8]
    assert all(isinstance(layer, getattr(mmcv.ops, name)) for layer in layers)


def test_the_extractor_takes_layers_of_mmcv_and_classes() -> None:
    """It leaves the config as it is."""
    assert isinstance(extractor(mmdcn.SingleRoIExtractor, 'RoIAlign').roi_layers[0], mmcv.ops.RoIAlign)
    cfg = dict(type=modules.DeformRoIPool, output_size=2)
    mmdcn.SingleRoIExtractor(roi_layer=cfg, out_channels=4, featmap_strides=[4])
    assert cfg == dict(type=modules.DeformRoIPool, output_size=2)


def test_a_layer_that_is_nowhere_is_refused_by_name() -> None:
    message = "^the type of roi_layer must be in mmdcn's registry or in mmcv.ops, got 'DeformRoiPool'$"
    with pytest.raises(ValueError, match=message):
        extractor(mmdcn.SingleRoIExtractor, 'DeformRoiPool')


def test_mmdets_own_extractor_finds_them_while_mmdet_is_patched() -> None:
    before = {name: getattr(mmcv.ops, name) for name in LAYERS}
    mmdcn.patch_mmdet()
    for name in LAYERS:
        assert type(extractor(MMDetSingleRoIExtractor, name).roi_layers[0]) is getattr(modules, name)
    mmdcn.unpatch_mmdet()
    assert {name: getattr(mmcv.ops, name) for name in LAYERS} == before
    with pytest.raises(AssertionError):  # once it does not: mmdcn.SingleRoIExtractor may go
        extractor(MMDetSingleRoIExtractor, 'mmdcn.DeformRoIPool')


@pytest.mark.parametrize('name', LAYERS)
def test_a_built_layer_is_converted(name: str) -> None:
    model = randomised(extractor(MMDetSingleRoIExtractor, name))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mmdcn.convert_model(model)
    assert [type(layer) for layer in model.roi_layers] == [getattr(modules, name)] * 2
    torch.testing.assert_close(dict(model.state_dict()), state)
    assert model((draw_input(), draw_input()[..., :6, :8]), draw_rois()).shape == (7, 4, 2, 3)


@pytest.mark.parametrize(
    'config', ['dcn/faster-rcnn_r50_fpn_dpool_1x_coco', 'dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco']
)
def test_a_detector_of_the_zoo_trains_and_predicts(config: str) -> None:
    register_all_modules()
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    cfg.merge_from_dict({
        'model.backbone.init_cfg': None, 'model.backbone.depth': 18, 'model.backbone.base_channels': 8,
        'model.neck.in_channels': [8, 16, 32, 64], 'model.train_cfg.rpn_proposal.max_per_img': 20,
        'model.test_cfg.rpn.max_per_img': 20,
    })  # fmt: skip
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    batch = model.data_preprocessor(demo_mm_inputs(2, [[3, 64, 96], [3, 80, 64]]), training=True)
    losses = model(**batch, mode='loss')
    sum(sum(value) if isinstance(value, list) else value for key, value in losses.items() if 'loss' in key).backward()
    layers = model.roi_head.bbox_roi_extractor.roi_layers
    assert all(type(layer).__module__ == 'mmdcn.modules.deform_roi_pool' for layer in layers)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in layers.parameters())
    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(demo_mm_inputs(1, [[3, 64, 96]]), training=False), mode='predict')
    assert results[0].pred_instances.bboxes.isfinite().all()
