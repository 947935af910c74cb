# SPDX-License-Identifier: Apache-2.0
"""The switches: what mmdet builds, or has built, on mmcv's deformable convolutions gives the same on mmdcn's."""

import argparse
import ast
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mmcv.ops
import mmdet
import pytest
import torch
from mmcv.cnn import build_conv_layer
from mmdet.models import backbones, dense_heads, necks
from mmdet.models.dense_heads.atss_vlfusion_head import Conv3x3Norm, DyConv
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import mmdcn
from mmdcn import modules
from mmdcn.engine.launch import load_config
from mmdcn.openmmlab.counterparts import FUNCTIONS

MMDET = Path(mmdet.__file__).parent
GN = dict(type='GN', num_groups=2)
HEAD = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2)
LAYERS = (mmcv.ops.DeformConv2d, mmcv.ops.ModulatedDeformConv2d)


def levels(*sizes: tuple[int, int], channels: int = 8) -> list[Tensor]:
    return [torch.randn(2, channels, *size, dtype=torch.float64) for size in sizes]


def pyramid() -> list[Tensor]:
    return levels((9, 14), (5, 7))


@dataclass(frozen=True)
class Case:
    """A part of mmdet with deformable layers, built from its smallest sizes."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any] = lambda: (pyramid(),)


def solov2() -> nn.Module:
    mask = ConfigDict(feat_channels=8, start_level=0, end_level=1, out_channels=4, conv_cfg=dict(type='DCNv2'))
    sizes = dict(num_grids=[4, 3], strides=[8, 16], scale_ranges=[(1, 96), (48, 192)])
    return dense_heads.SOLOV2Head(**HEAD, **sizes, norm_cfg=GN, mask_feature_head=mask, dcn_cfg=dict(type='DCNv2'))


def resnet(name: str) -> nn.Module:
    dcn = dict(type=name, deform_groups=2, fallback_on_stride=False)
    return backbones.ResNet(50, base_channels=4, dcn=dcn, stage_with_dcn=(False, False, False, True))


BY_NAME = {  # mmdet's registry finds their layers
    'FCOS': Case(lambda: dense_heads.FCOSHead(**HEAD, norm_cfg=GN, dcn_on_last_conv=True)),
    'YOLOX': Case(lambda: dense_heads.YOLOXHead(**HEAD, norm_cfg=GN, dcn_on_last_conv=True, strides=(8, 16))),
    'DDOD': Case(lambda: dense_heads.DDODHead(**HEAD, norm_cfg=GN, anchor_generator=anchors())),
    'NAS-FCOS': Case(lambda: dense_heads.NASFCOSHead(**HEAD, norm_cfg=GN)),
    'CTResNetNeck': Case(lambda: necks.CTResNetNeck(8, (6, 4), (4, 4))),
    'SOLOv2': Case(solov2, lambda: (levels((8, 12), (4, 6)),)),
    'ResNet DCN': Case(partial(resnet, 'DCN'), lambda: levels((66, 97), channels=3)),
    'ResNet DCNv2': Case(partial(resnet, 'DCNv2'), lambda: levels((66, 97), channels=3)),
}
BY_IMPORT = {  # they import mmcv.ops
    'RepPoints': Case(lambda: dense_heads.RepPointsHead(**HEAD, point_feat_channels=8)),
    'VFNet': Case(lambda: dense_heads.VFNetHead(**HEAD, norm_cfg=GN, bbox_norm_type='stride')),
    'FoveaBox': Case(lambda: dense_heads.FoveaHead(**HEAD, with_deform=True)),
    'guided anchoring': Case(lambda: dense_heads.GARetinaHead(**HEAD)),
    'cascade RPN': Case(
        lambda: dense_heads.StageCascadeRPNHead(8, feat_channels=8, adapt_cfg=dict(type='offset')),
        lambda: (levels((9, 14)), [torch.randn(2, 9 * 14, 18, dtype=torch.float64)]),
    ),
    'CentripetalNet': Case(
        lambda: dense_heads.CentripetalHead(num_classes=3, in_channels=8, num_feat_levels=1, corner_emb_channels=0),
        lambda: (levels((9, 14)),),
    ),
    'DyHead': Case(lambda: necks.DyHead(8, 16, num_blocks=1)),
    'GLIP': Case(
        lambda: DyConv(partial(Conv3x3Norm, use_dcn=True, norm_type=('gn', 2)), 8, 8, use_dcn=True),
        lambda: (dict(visual=pyramid(), lang=None),),
    ),
}
BY_FUNCTION = {  # they call mmcv's function
    'TOOD': Case(lambda: dense_heads.TOODHead(**HEAD, norm_cfg=GN, num_dcn=1, anchor_generator=anchors())),
    'DetectoRS': Case(
        lambda: build_conv_layer(dict(type='SAC', use_deform=True), 8, 6, kernel_size=3, stride=2, padding=1, groups=2),
        lambda: levels((9, 14)),
    ),
}
CASES = {**BY_NAME, **BY_IMPORT, **BY_FUNCTION}


def anchors() -> dict:
    return dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16])


@pytest.fixture(autouse=True)
def in_the_scope_of_mmdet_unpatched() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield
    mmdcn.unpatch_mmdet()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def randomised(model: nn.Module) -> nn.Module:
    """In float64, so that rounding moves no sample into another cell."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double()


def run(model: nn.Module, inputs: Any) -> tuple[list[Tensor], set[str]]:
    """Return all outputs, the gradients of the parameters that have any, and the names of the operators that ran."""
    with torch.autograd.profiler.profile() as profile:
        outputs = [output for output in tree_leaves(model(*inputs)) if isinstance(output, Tensor)]
        loss = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    present = [gradient for gradient in gradients if gradient is not None]
    return [*outputs, *present], {event.name for event in profile.function_events}


def assert_the_same_on_mmdcn(theirs: nn.Module, inputs: Any, switch: Callable[[], nn.Module]) -> None:
    expected, before = run(theirs, inputs)
    results, after = run(switch(), inputs)
    assert len(results) == len(expected)
    for result, one in zip(results, expected, strict=True):
        # Exact but for the order of the sums, in which a gradient may cancel out, and for what a head does in float32.
        torch.testing.assert_close(result, one, rtol=1e-5, atol=1e-9 + 1e-6 * one.abs().max().item())
    assert any('DeformConv2dFunction' in name for name in before)
    assert not any('DeformConv2dFunction' in name for name in after)
    assert {'mmdcn::deform_conv2d', 'mmdcn::deform_conv2d_backward'} <= after


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('name', CASES)
def test_built_after_patch_mmdet_it_gives_what_it_gives_on_mmcv(name: str) -> None:
    torch.manual_seed(0)
    theirs, inputs = randomised(CASES[name].build()), CASES[name].inputs()

    def patched() -> nn.Module:
        mmdcn.patch_mmdet()
        ours = CASES[name].build().double()
        ours.load_state_dict(theirs.state_dict())
        return ours

    assert_the_same_on_mmdcn(theirs, inputs, patched)


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('name', {**BY_NAME, **BY_IMPORT})
def test_converted_it_gives_what_it_gave_on_mmcv(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(CASES[name].build())
    assert_the_same_on_mmdcn(model, CASES[name].inputs(), lambda: mmdcn.convert_model(model))


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('name', BY_FUNCTION)
def test_patch_mmdet_reaches_the_functions_that_a_built_model_calls(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(CASES[name].build())

    def switched() -> nn.Module:
        mmdcn.patch_mmdet()
        return mmdcn.convert_model(model)

    assert_the_same_on_mmdcn(model, CASES[name].inputs(), switched)


@pytest.mark.mmcv_ops
def test_tood_samples_float32_boxes_without_rounding_them() -> None:
    """Their offsets are bfloat16 under autocast."""
    torch.manual_seed(0)
    head, boxes, offset = BY_FUNCTION['TOOD'].build(), 1000 * torch.rand(2, 4, 5, 7), torch.randn(2, 8, 5, 7).bfloat16()
    expected = head.deform_sampling(boxes, offset.float())
    mmdcn.patch_mmdet()
    with torch.autocast('cpu', torch.bfloat16):
        result = head.deform_sampling(boxes, offset)
    # Four corners, each weighted twice: 8 roundings.
    torch.testing.assert_close(result, expected, rtol=8 * 2**-24, atol=1000 * 8 * 2**-24)


def test_the_function_takes_every_argument_of_mmcvs() -> None:
    x, offset, weight = torch.randn(1, 4, 5, 6), torch.randn(1, 36, 5, 6), torch.randn(6, 2, 3, 3)
    arguments = (x, offset, weight, (1, 1), (1, 1), (1, 1), 2, 2, False, 32)
    torch.testing.assert_close(FUNCTIONS[mmcv.ops.deform_conv2d](*arguments), mmcv.ops.deform_conv2d(*arguments))


def test_offsets_for_fewer_positions_than_the_output_has_are_refused() -> None:
    layer = mmdcn.convert_model(mmcv.ops.ModulatedDeformConv2d(4, 6, 3, padding=1))
    with pytest.raises(ValueError, match='offset must have shape'):
        layer(torch.randn(1, 4, 5, 7), torch.randn(1, 18, 5, 6), torch.rand(1, 9, 5, 6))


def imports_of_mmcv() -> Iterator[tuple[str, str]]:
    """Read in mmdet's sources which modules import a deformable convolution, under which name."""
    names = {'DeformConv2d', 'DeformConv2dPack', 'ModulatedDeformConv2d', 'ModulatedDeformConv2dPack', 'deform_conv2d',
             'modulated_deform_conv2d'}  # fmt: skip
    for path in MMDET.glob('models/**/*.py'):
        module = '.'.join(path.relative_to(MMDET.parent).with_suffix('').parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('mmcv.ops'):
                yield from ((module, alias.name) for alias in node.names if alias.name in names)


def test_patch_mmdet_replaces_every_import_and_unpatch_mmdet_restores_it() -> None:
    """These are mmdet's imports of mmcv's deformable convolutions."""
    places = list(imports_of_mmcv())
    assert len(places) == 9

    def origins() -> set[str]:
        return {getattr(sys.modules[module], name).__module__.split('.')[0] for module, name in places}

    before = [getattr(sys.modules[module], name) for module, name in places]
    mmdcn.patch_mmdet()
    assert origins() == {'mmdcn'}
    mmdcn.unpatch_mmdet()
    assert [getattr(sys.modules[module], name) for module, name in places] == before
    assert not {'DCN', 'DCNv2'} & set(MODELS.module_dict)


def test_each_switch_says_once_what_it_changed(log: pytest.LogCaptureFixture) -> None:
    mmdcn.patch_mmdet()
    mmdcn.patch_mmdet()
    mmdcn.unpatch_mmdet()
    mmdcn.unpatch_mmdet()
    on, off = (record.getMessage().splitlines() for record in log.records)
    assert on[0] == 'Switched to mmdcn:'
    assert off[0] == 'Switched back to mmcv:'
    assert on[1:] == off[1:]
    assert {'  mmdet.registry.MODELS: DCN', '  mmdet.models.necks.dyhead: ModulatedDeformConv2d'} < set(on)


def test_the_overrides_reach_the_scope_of_mmdet_and_no_other() -> None:
    import mmdcn.overrides  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmengine'):
        elsewhere = build_conv_layer(dict(type='DCNv2'), 4, 4, kernel_size=3)
    assert type(elsewhere) is mmcv.ops.ModulatedDeformConv2dPack
    assert ROOT_MODELS.get('DCNv2') is mmcv.ops.ModulatedDeformConv2dPack
    assert type(build_conv_layer(dict(type='DCNv2'), 4, 4, kernel_size=3)) is modules.ModulatedDeformConv2dPack
    assert type(build_conv_layer(dict(type='DCN'), 4, 4, kernel_size=3)) is modules.DeformConv2dPack


@pytest.mark.parametrize('way', ['in the config', 'on the command line'])
def test_one_line_turns_every_layer_of_an_unchanged_config_over(way: str, tmp_path: Path) -> None:
    (config,) = MMDET.glob('.mim/configs/fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-*_1x_coco.py')
    options = {'custom_imports.imports': ['mmdcn.overrides']}
    if way == 'in the config':
        options = None
        path = tmp_path / 'config.py'
        path.write_text(f"_base_ = '{config}'\ncustom_imports = dict(imports=['mmdcn.overrides'])\n")
        config = path
    cfg = load_config(
        argparse.Namespace(config=config, cfg_options=options, launcher='none', local_rank=0, work_dir='')
    )
    model = MODELS.build(cfg.model)
    # 13 in the backbone, and one before the classes and one before the boxes in the head.
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    assert [type(layer) for layer in layers] == [modules.ModulatedDeformConv2dPack] * 15


def dyhead_of_a_config(switch: str, folder: Path) -> nn.Module:
    path = folder / 'config.py'
    path.write_text(f"custom_imports = dict(imports=['{switch}'])\nmodel = dict(type='DCNv2')\n")
    args = argparse.Namespace(config=path, cfg_options=None, launcher='none', local_rank=0, work_dir='')
    layer = build_conv_layer(load_config(args).model, 4, 4, kernel_size=3)
    return nn.ModuleList([layer, *BY_IMPORT['DyHead'].build().modules()])


@pytest.mark.parametrize('second', ['mmdcn.overrides', 'mmdcn.overrides_everywhere'])
@pytest.mark.parametrize('first', ['mmdcn.overrides', 'mmdcn.overrides_everywhere'])
def test_after_an_unpatch_each_further_config_switches_on_again(first: str, second: str, tmp_path: Path) -> None:
    for switch in (first, second, second):
        layers = [layer for layer in dyhead_of_a_config(switch, tmp_path).modules() if isinstance(layer, LAYERS)]
        ours = [type(layer).__module__.startswith('mmdcn') for layer in layers]
        assert ours == [True] + [switch == 'mmdcn.overrides_everywhere'] * (len(ours) - 1)
        assert len(ours) > 1
        mmdcn.unpatch_mmdet()
        plain = build_conv_layer(dict(type='DCNv2'), 4, 4, kernel_size=3)
        assert type(plain) is mmcv.ops.ModulatedDeformConv2dPack


def test_the_old_name_of_the_wider_switch_works_and_warns(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match='mmdcn.overrides_everywhere'):
        model = dyhead_of_a_config('mmdcn.patched', tmp_path)
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    assert len(layers) > 1 and all(type(layer).__module__.startswith('mmdcn.') for layer in layers)


class Block(nn.Module):
    """Every layer of mmcv's, one of them by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.packs = nn.Sequential(
            mmcv.ops.DeformConv2dPack(4, 6, 3, padding=1), mmcv.ops.ModulatedDeformConv2dPack(6, 4, 3, padding=1)
        )
        self.plain = mmcv.ops.DeformConv2d(4, 4, 1)
        self.modulated = mmcv.ops.ModulatedDeformConv2d(4, 4, 1)
        self.again = self.plain

    def forward(self, x: Tensor) -> Tensor:
        x = self.packs(x)
        offset, mask = x[:, :2].contiguous(), x[:, 2:3].sigmoid()
        return self.again(self.modulated(self.plain(x, offset), offset, mask), offset)


def test_a_conversion_keeps_modules_parameters_and_hooks(log: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = randomised(Block())
    model.packs[0].eval()
    model.plain.weight.requires_grad_(False)
    calls = []
    model.modulated.register_forward_hook(lambda *call: calls.append(call[0]))

    def identities() -> list:
        layers = [(name, id(layer), layer.training) for name, layer in model.named_modules(remove_duplicate=False)]
        return [*layers, *((name, id(parameter)) for name, parameter in model.named_parameters())]

    before = identities()
    x = levels((5, 7), channels=4)[0]
    expected = model(x)
    assert mmdcn.convert_model(model) is model
    assert identities() == before
    assert all(type(layer).__module__.startswith('mmdcn') for layer in model.modules() if isinstance(layer, LAYERS))
    torch.testing.assert_close(model(x), expected)
    assert calls == [model.modulated, model.modulated]
    assert '1 DeformConv2dPack' in log.messages[0]


def test_a_conversion_leaves_the_optimizer_valid() -> None:
    torch.manual_seed(0)
    models = [randomised(Block()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for step in range(3):
        if step == 1:
            mmdcn.convert_model(models[1])
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(levels((5, 7), channels=4)[0]).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize('layer', [mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack])
def test_the_model_may_be_a_layer(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomised(layer(4, 6, 3, stride=2))
    assert_the_same_on_mmdcn(model, levels((5, 7), channels=4), lambda: mmdcn.convert_model(model))


def test_a_distributed_model_is_converted_within_its_wrapper() -> None:
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = DistributedDataParallel(randomised(Block()), find_unused_parameters=True)
        assert_the_same_on_mmdcn(model, levels((5, 7), channels=4), lambda: mmdcn.convert_model(model))
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_that_derives_from_mmcv_s_is_left_alone_and_named(log: pytest.LogCaptureFixture) -> None:
    class Own(mmcv.ops.DeformConv2d):
        pass

    model = nn.Sequential(nn.Identity(), Own(4, 4, 1), modules.DeformConv2d(4, 4, 1))
    mmdcn.convert_model(model)
    assert [type(layer) for layer in model] == [nn.Identity, Own, modules.DeformConv2d]
    (message,) = log.messages
    assert message.startswith('Left unchanged')
    assert '\n  1: test_patching.' in message
    assert message.endswith('.Own')
