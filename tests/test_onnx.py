# SPDX-License-Identifier: Apache-2.0
"""What is exported to ONNX gives, in ONNX Runtime, what it gave in torch."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import deform_roi_pool_cases as roi_pool
import onnxruntime
import pytest
import torch
from deform_conv2d_cases import CASES, Call, assert_close
from mmcv import ops
from small_detectors import build, fcos_config
from torch import Tensor, nn
from torch.export import Dim

import mmdcn.onnx
from mmdcn import reference
from mmdcn.ops import deform_conv2d, deform_roi_pool


class Layer(nn.Module):
    """A call of the operator whose weights are the module's, as a layer's are."""

    def __init__(self, call: Call):
        super().__init__()
        self.call, self.weight, self.bias = call, nn.Parameter(call.weight), call.bias

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        geometry = (self.call.stride, self.call.padding, self.call.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, *geometry, mask)


def export(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, **settings: object) -> None:
    table = mmdcn.onnx.TRANSLATIONS
    torch.onnx.export(
        model.eval(), inputs, path, dynamo=True, custom_translation_table=table, verbose=False, **settings
    )


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [argument.name for argument in session.get_inputs()]
    arrays = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error := error and error.__cause__:
        yield error


@pytest.mark.parametrize('name', CASES)
def test_onnx_runtime_gives_what_the_reference_gives(name: str, tmp_path: Path) -> None:
    call = CASES[name].draw(torch.float32)
    inputs = (call.input, call.offset) + (() if call.mask is None else (call.mask,))
    export(Layer(call), inputs, tmp_path / 'layer.onnx')
    (output,) = run(tmp_path / 'layer.onnx', inputs)
    expected = call.map(Tensor.double)(reference.deform_conv2d)
    assert_close({'output': output}, {'output': expected}, call)


def in_double(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [level.double() for levels in deepcopy(model).double()(images.double()) for level in levels]


@pytest.mark.parametrize('layer', ['mmdcn.DCN', 'mmdcn.DCNv2'])
def test_a_detector_is_exported_for_images_of_any_number_and_size(layer: str, tmp_path: Path) -> None:
    model = build(fcos_config(layer=layer)).eval()
    offsets = [module.conv_offset for module in model.modules() if hasattr(module, 'conv_offset')]
    for conv in offsets:
        nn.init.normal_(conv.weight, std=0.05)
    for conv in (model.bbox_head.conv_cls, model.bbox_head.conv_reg, model.bbox_head.conv_centerness):
        # Values that the images make, not a bias that is large beside them.
        nn.init.normal_(conv.weight, std=0.5)
        nn.init.zeros_(conv.bias)
    # A sum of n products in any order is within n eps / 2 of its magnitudes' sum, some sqrt(n) times its own. n is 288
    # or less; relative to the values the error of a layer passes on, and there are some 20 layers.
    tolerance = 20 * 288**1.5 * torch.finfo(torch.float32).eps / 2
    batches = [torch.randn(2, 3, 64, 96), torch.randn(3, 3, 96, 160)]
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    export(model, (batches[0],), tmp_path / 'detector.onnx', dynamic_shapes=sizes)
    expected = [in_double(model, images) for images in batches]
    for conv in offsets:
        nn.init.zeros_(conv.weight)
    for images, levels in zip(batches, expected, strict=True):
        outputs, undeformed = run(tmp_path / 'detector.onnx', (images,)), in_double(model, images)
        for output, same, other in zip(outputs, levels, undeformed, strict=True):
            largest = same.abs().max().item()
            torch.testing.assert_close(output.double(), same, rtol=0, atol=tolerance * largest)
            assert (same - other).abs().max() > 10 * tolerance * largest


@pytest.mark.mmcv_ops
@pytest.mark.parametrize('layer', [ops.DeformConv2dPack, ops.ModulatedDeformConv2dPack])
def test_mmcvs_layers_stop_the_exporter(layer: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError):
        export(layer(4, 6, 3), (torch.randn(1, 4, 5, 7),), tmp_path / 'layer.onnx')


def test_two_types_in_one_call_are_refused(tmp_path: Path) -> None:
    call = CASES['everything at once'].draw(torch.float32)
    layer = Layer(call.map(Tensor.half)).half()
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(layer, (call.input.half(), call.offset, call.mask), tmp_path / 'layer.onnx')
    (cause,) = (cause for cause in causes(error.value) if isinstance(cause, ValueError))
    assert 'export the model without autocast' in str(cause)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('opset', [16, 18])
def test_an_opset_without_deform_conv_is_refused_and_leaves_no_file(opset: int, tmp_path: Path) -> None:
    call = CASES['everything at once'].draw(torch.float32)
    inputs = (call.input, call.offset, call.mask)
    with pytest.raises(torch.onnx.OnnxExporterError, match='export with opset_version=19 or later'):
        export(Layer(call), inputs, tmp_path / 'layer.onnx', opset_version=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('opset', [19, 22])
def test_an_opset_with_deform_conv_gives_a_file_that_runs(opset: int, tmp_path: Path) -> None:
    call = CASES['everything at once'].draw(torch.float32)
    inputs = (call.input, call.offset, call.mask)
    export(Layer(call), inputs, tmp_path / 'layer.onnx', opset_version=opset)
    (output,) = run(tmp_path / 'layer.onnx', inputs)
    assert_close({'output': output}, {'output': call.map(Tensor.double)(reference.deform_conv2d)}, call)


class RoIPool(nn.Module):
    """A call of deformable RoI pooling."""

    def __init__(self, call: roi_pool.Call):
        super().__init__()
        self.settings = (call.output_size, call.spatial_scale, call.sampling_ratio, call.gamma)

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        return deform_roi_pool(input, rois, offset, *self.settings)


@pytest.mark.parametrize('name', ['defaults', 'no offsets', 'two samples', 'far beyond the image', 'enlarged'])
def test_onnx_runtime_pools_as_the_reference_does(name: str, tmp_path: Path) -> None:
    call = roi_pool.CASES[name].draw(torch.float32)
    inputs = (call.input, call.rois) + (() if call.offset is None else (call.offset,))
    export(RoIPool(call), inputs, tmp_path / 'pool.onnx')
    (output,) = run(tmp_path / 'pool.onnx', inputs)
    expected = call.map(Tensor.double)(reference.deform_roi_pool)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
