# SPDX-License-Identifier: Apache-2.0
"""torch.fx takes a layer and a function for one node, quantization leaves it alone, TorchScript is traced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models import ResNet
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from mmdcn import modules, ops
from mmdcn.openmmlab import counterparts

CONV = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1)
PACKS = ['DeformConv2dPack', 'ModulatedDeformConv2dPack']


class Net(nn.Module):
    """A layer between two of torch's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Conv2d(3, 4, 3), getattr(modules, name)(**CONV), nn.Conv2d(6, 5, 1)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)).relu())


class WithOffsets(nn.Module):
    """A layer that takes two tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.layer(x, places)


class WithMasks(WithOffsets):
    """A layer that takes three."""

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, places, mask=mask)


def nodes(graph: fx.GraphModule, op: str) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == op]


@pytest.mark.parametrize('name', PACKS)
def test_a_layer_is_one_node_and_the_graph_gives_what_the_model_gives(name: str) -> None:
    torch.manual_seed(0)
    model = Net(name)
    graph = fx.symbolic_trace(model)
    assert nodes(graph, 'call_module') == ['before', 'layer', 'after']
    x = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    with torch.autocast('cpu', torch.bfloat16):  # its offsets stay in float32, as they do without a graph
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


IMAGE, OFFSET, MASK = torch.randn(2, 4, 5, 7), torch.randn(2, 18, 5, 7), torch.rand(2, 9, 5, 7)
ROIS = torch.tensor([[0, 1.0, 1.0, 4.0, 3.0], [1, 0.0, 2.0, 5.0, 4.0]])
ROI = dict(output_size=(2, 3), output_channels=4, deform_fc_channels=8)
FROM_OUTSIDE = {
    'DeformConv2d': (lambda: modules.DeformConv2d(**CONV), (IMAGE, OFFSET)),
    'ModulatedDeformConv2d': (lambda: modules.ModulatedDeformConv2d(**CONV), (IMAGE, OFFSET, MASK)),
    'that of patch_mmdet': (lambda: counterparts._ModulatedDeformConv2d(**CONV), (IMAGE, OFFSET, MASK)),
    'DeformRoIPool': (lambda: modules.DeformRoIPool((2, 3)), (IMAGE, ROIS)),
    'DeformRoIPoolPack': (lambda: modules.DeformRoIPoolPack(**ROI), (IMAGE, ROIS)),
    'ModulatedDeformRoIPoolPack': (lambda: modules.ModulatedDeformRoIPoolPack(**ROI), (IMAGE, ROIS)),
}


@pytest.mark.parametrize('name', FROM_OUTSIDE)
def test_so_is_a_layer_that_takes_several_tensors(name: str) -> None:
    make, inputs = FROM_OUTSIDE[name]
    model = (WithOffsets if len(inputs) == 2 else WithMasks)(make())
    graph = fx.symbolic_trace(model)
    assert nodes(graph, 'call_module') == ['layer']
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=0, atol=0)


def convolve(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return ops.deform_conv2d(x, offset, weight, padding=1)


def pool(x: Tensor, rois: Tensor) -> Tensor:
    return ops.deform_roi_pool(input=x, rois=rois, offset=None, output_size=2)


def convolve_as_mmcv(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return counterparts._deform_conv2d(x, offset, weight, 1, 1)


@pytest.mark.parametrize(
    ('function', 'inputs', 'target'),
    [
        (convolve, (IMAGE, OFFSET, torch.randn(6, 4, 3, 3)), ops.deform_conv2d),
        (pool, (IMAGE, ROIS), ops.deform_roi_pool),
        (convolve_as_mmcv, (IMAGE, OFFSET, torch.randn(6, 4, 3, 3)), counterparts._deform_conv2d),
    ],
)
def test_so_is_a_function(function: Any, inputs: tuple, target: Any) -> None:
    graph = fx.symbolic_trace(function)
    assert nodes(graph, 'call_function') == [target]
    torch.testing.assert_close(graph(*inputs), function(*inputs), rtol=0, atol=0)


def test_a_function_keeps_the_class_of_its_tensors() -> None:
    class Image(Tensor):
        pass

    assert type(ops.deform_roi_pool(IMAGE.as_subclass(Image), ROIS, None, 2)) is Image


@pytest.mark.parametrize('name', PACKS)
def test_a_resnet_of_mmdet_is_traced(name: str) -> None:
    torch.manual_seed(0)
    backbone = ResNet(50, base_channels=4, dcn=dict(type=f'mmdcn.{name}'), stage_with_dcn=(False, False, True, True))
    backbone.eval()
    x = torch.randn(1, 3, 33, 47)
    for got, expected in zip(fx.symbolic_trace(backbone)(x), backbone(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_model_that_is_nothing_but_a_layer_is_told_what_to_trace() -> None:
    layer = modules.DeformConv2dPack(**CONV)
    with pytest.raises(NotImplementedError, match=r'cannot trace the layer on its own: trace nn.Sequential'):
        fx.symbolic_trace(layer)
    assert nodes(fx.symbolic_trace(nn.Sequential(layer)), 'call_module') == ['0']


@pytest.mark.parametrize('training', [False, True], ids=['after training', 'while training'])
@pytest.mark.parametrize('name', PACKS)
def test_quantization_in_graph_mode_leaves_the_layer_in_floating_point(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(name).train(training), torch.randn(2, 3, 16, 18)
    if training:
        prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping('x86'), (x,))
    else:
        prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (x,))
    prepared(x)
    quantized = convert_fx(prepared.eval())
    assert type(quantized.layer) is getattr(modules, name)
    assert type(quantized.layer.conv_offset) is type(model.layer.conv_offset)
    assert 'quantized' in type(quantized.before).__module__
    expected = model(x)
    # Three roundings to 8 bits, each of at most 1/128 of the largest value, which the layer sums up.
    assert (quantized(x) - expected).abs().mean() < 0.05 * expected.abs().max()


@pytest.mark.parametrize('name', [*PACKS, 'DeformRoIPool', 'DeformRoIPoolPack'])
def test_torchscript_is_refused_with_the_remedy(name: str) -> None:
    layer = getattr(modules, name)(**(CONV if name in PACKS else ROI if name.endswith('Pack') else dict(output_size=2)))
    with pytest.raises(NotImplementedError, match=f'cannot compile the Python of mmdcn.{name}: use torch.jit.trace'):
        torch.jit.script(nn.Sequential(nn.ReLU(), layer))


@pytest.mark.parametrize('name', PACKS)
def test_the_remedy_works(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(name).eval(), torch.randn(2, 3, 8, 9)
    torch.jit.trace(model, (x,)).save(tmp_path / 'traced.pt')
    larger = torch.randn(3, 3, 10, 7)
    torch.testing.assert_close(torch.jit.load(tmp_path / 'traced.pt')(larger), model(larger))
