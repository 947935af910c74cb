# SPDX-License-Identifier: Apache-2.0
"""FLOPs, parameters and activations of each layer of a detector, and the tensors of a layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from small_detectors import build, faster_rcnn_config, fcos_config

import mmdcn
from mmdcn.ops import deform_conv2d
from mmdcn.visualization.complexity import DetectorComplexity, detector_complexity
from mmdcn.visualization.shapes import steps_of

MDPOOL = Path(__file__).parents[1] / 'configs/mnist_scenes/faster-rcnn_r18-w32_fpn_mdpool_6e_mnist-scenes.py'


def complexity_of(cfg: dict) -> DetectorComplexity:
    return detector_complexity(build(cfg), 50, 78)  # padded to 64 x 96, or 64 x 80 for FCOS


def test_of_a_deformable_layer_everything_is_counted_by_both_counters() -> None:
    layers = {layer.name: layer for layer in complexity_of(faster_rcnn_config()).layers}
    layer, offsets = (layers['backbone.layer2.0.conv2' + name] for name in ('', '.conv_offset'))
    positions = 8 * 12
    product, samples = positions * 16 * 16 * 9, positions * 16 * 9
    assert (layer.parameters, layer.activations) == (16 * 16 * 9, positions * 16)
    assert layer.flops == product + 4 * samples
    assert offsets.flops == positions * 16 * 27 * 9
    assert (offsets.parameters, offsets.activations) == (27 * (16 * 9 + 1), positions * 27)
    assert (layer.flops_of_torch, offsets.flops_of_torch) == (2 * layer.flops, 2 * offsets.flops)


@pytest.mark.parametrize('config', [fcos_config, faster_rcnn_config, lambda: Config.fromfile(MDPOOL).model])
def test_both_counters_agree_on_every_layer_that_torch_counts(config: Callable[[], dict]) -> None:
    found = complexity_of(config())
    counted = [layer for layer in found.layers if layer.flops_of_torch]
    assert len(counted) > 20
    # mmcv's RoIAlign is a function of Python, into which mmengine does not look.
    assert [
        layer.name for layer in counted if layer.flops_of_torch != 2 * layer.flops and layer.kind != 'RoIAlign'
    ] == []
    others = {layer.kind for layer in found.layers if layer.flops and not layer.flops_of_torch}
    assert others <= {'BatchNorm2d', 'FPN'}  # which scale and resize


def test_roi_pooling_is_counted() -> None:
    found = complexity_of(Config.fromfile(MDPOOL).model)
    pools = [layer for layer in found.layers if layer.kind == 'ModulatedDeformRoIPoolPack']
    assert pools and all(layer.flops and layer.activations for layer in pools)


def test_the_rows_add_up_to_the_detector() -> None:
    model = build(fcos_config())
    found = detector_complexity(model, 50, 78)
    assert found.total('parameters') == sum(parameter.numel() for parameter in model.parameters())
    assert all(min(layer.activations, layer.flops, layer.flops_of_torch) >= 0 for layer in found.layers)
    assert 'prim::PythonOp.RoIAlignFunction' in complexity_of(faster_rcnn_config()).uncounted


@pytest.mark.parametrize('layer', [mmdcn.DCN, mmdcn.DCNv2])
@pytest.mark.parametrize('groups', [1, 2])
def test_the_steps_of_a_layer_are_those_of_the_operator_and_its_gradients(layer: type, groups: int) -> None:
    torch.manual_seed(0)
    model = layer(4, 6, 3, stride=(1, 2), padding=(1, 0), deform_groups=groups)
    torch.nn.init.normal_(model.conv_offset.weight, std=0.3)
    input = torch.randn(2, 4, 6, 9)
    steps = {step.name: step.value.detach() for step in steps_of(model, input)}
    leaves = {
        name: steps[name].clone().requires_grad_() for name in ('input', 'offset', 'mask', 'weight') if name in steps
    }
    settings = (model.stride, model.padding, model.dilation, leaves.get('mask'))
    output = deform_conv2d(leaves['input'], leaves['offset'], leaves['weight'], model.bias, *settings)
    torch.testing.assert_close(steps['output'], output.detach())
    gradients = torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(steps[f"{name}'s gradient"], gradient, rtol=1e-4, atol=1e-4)
    columns = steps['columns'].transpose(1, 2) @ steps['weight'].flatten(1).T
    bias = 0 if model.bias is None else model.bias.detach()
    torch.testing.assert_close(
        (columns + bias).transpose(1, 2).reshape(output.shape), output.detach(), rtol=1e-4, atol=1e-4
    )


def test_the_axes_of_every_step_are_as_long_as_its_name_says() -> None:
    model = mmdcn.DCNv2(4, 6, (3, 1), stride=2, padding=(1, 0), deform_groups=2)
    sizes = dict(B=2, C_in=4, C_out=6, H=7, W=9, G=2, K=3, kh=3, kw=1, H_out=4, W_out=5, P=20)
    for step in steps_of(model, torch.randn(2, 4, 7, 9)):
        axes = step.axes.replace('(y, x)', '2').replace('/', '//').split(', ')
        assert list(step.value.shape) == [eval(axis, dict(sizes)) for axis in axes], step.name


def test_the_steps_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match='must be a packed deformable convolution with groups = 1, got'):
        steps_of(mmdcn.DCN(4, 4, 3, groups=2), torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match='must be a packed'):
        steps_of(torch.nn.Conv2d(4, 4, 3), torch.zeros(1, 4, 5, 5))
