# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d under torch's compilers: what they trace, and that they change nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from deform_conv2d_cases import CASES, Call, Case, assert_close, draw_grad_output, expected_gradients, gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from mmdcn.ops import deform_conv2d

Compile = Callable[..., Callable[..., Any]]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def operator_arguments(call: Call, case: Case) -> tuple[Any, ...]:
    geometry = (call.stride, call.padding, call.dilation, case.groups, case.offset_groups)
    return (call.input, call.offset, call.mask, call.weight, call.bias, *geometry)


def as_layout(call: Call, memory_format: torch.memory_format) -> Call:
    return replace(call, input=call.input.contiguous(memory_format=memory_format))


each_memory_format = pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels last']
)


# torch.library's own check: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes


@each_memory_format
@pytest.mark.parametrize(
    'name', ['everything at once', 'neither', 'one pixel', 'no image', 'groups across offset groups']
)
def test_opcheck_is_clean_on_the_operator(name: str, memory_format: torch.memory_format, device: str) -> None:
    case = CASES[name]
    call = as_layout(case.draw(device=device), memory_format).map(lambda tensor: tensor.requires_grad_())
    torch.library.opcheck(torch.ops.mmdcn.deform_conv2d, operator_arguments(call, case))


@pytest.mark.parametrize('mask', [True, False], ids=['mask', 'no mask'])
def test_opcheck_is_clean_on_its_backward(mask: bool, device: str) -> None:
    case = Case((2, 2), (4, 3), (3, 2), padding=(1, 1), groups=2, offset_groups=2, mask=mask)
    call = as_layout(case.draw(device=device), torch.channels_last if mask else torch.contiguous_format)
    call = call.map(lambda tensor: tensor.requires_grad_(mask))  # second derivatives take it long: once is enough
    input, offset, mask, weight, _, *settings = operator_arguments(call, case)
    output_mask = (True, True, mask is not None, True)
    arguments = (draw_grad_output(call), input, offset, mask, weight, *settings, output_mask, False)
    torch.library.opcheck(torch.ops.mmdcn.deform_conv2d_backward, arguments)


# Tensors without data


@each_memory_format
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('where', ['fake', 'meta'])
def test_without_data_every_result_has_its_size_type_and_strides(
    where: str, dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    """Fake tensors and those on the meta device have no data."""
    call = as_layout(CASES['everything at once'].draw(dtype, device), memory_format)
    expected = gradients(deform_conv2d, call, draw_grad_output(call))
    if where == 'meta':
        dataless = call.map(lambda tensor: tensor.to('meta'))
        actual = gradients(deform_conv2d, dataless, draw_grad_output(call).to('meta'))
    else:
        mode = FakeTensorMode()
        dataless, grad_output = call.map(mode.from_tensor), mode.from_tensor(draw_grad_output(call))
        with mode:
            actual = gradients(deform_conv2d, dataless, grad_output)
    assert {name: (t.shape, t.dtype, t.stride()) for name, t in actual.items()} == {
        name: (t.shape, t.dtype, t.stride()) for name, t in expected.items()
    }


# torch.compile


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@each_memory_format
def test_compiled_once_for_all_sizes_it_gives_the_same_results(
    backend: str, memory_format: torch.memory_format, device: str
) -> None:
    """Output and gradients are those of the reference."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=True, backend=counter)
    base = Case((6, 4), (9, 8), (3, 2), (2, 1), (1, 2), (2, 3), 2, 3)
    # In the first call no two sizes agree, since torch takes those that do for the same.
    for batch, size in ((8, (19, 10)), (3, (9, 8)), (5, (21, 17))):
        call = as_layout(replace(base, batch=batch, size=size).draw(device=device), memory_format)
        grad_output = draw_grad_output(call)
        assert_close(gradients(compiled, call, grad_output), expected_gradients(call, grad_output), call, grad_output)
    assert counter.frame_count == 1


@pytest.mark.parametrize('name', CASES)
def test_compiled_it_takes_every_case(name: str, device: str) -> None:
    call = CASES[name].draw(device=device)
    grad_output = draw_grad_output(call)
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend='aot_eager')
    assert_close(gradients(compiled, call, grad_output), expected_gradients(call, grad_output), call, grad_output)


def test_compiled_under_autocast_it_gives_the_same(device: str) -> None:
    call = CASES['everything at once'].draw(torch.float32, device)

    def function(call: Call) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return call(deform_conv2d)

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(call), function(call), rtol=0, atol=0)


def test_a_bad_call_is_an_error_when_it_is_compiled(device: str) -> None:
    call = CASES['everything at once'].draw(device=device)
    call = replace(call, offset=call.offset[..., 1:])
    compiled = torch.compile(deform_conv2d, backend='eager')
    with pytest.raises(ValueError, match='offset must have shape'):
        call(compiled)


def test_a_resnet_of_mmdet_with_dcnv2_compiles_without_a_graph_break() -> None:
    models = pytest.importorskip('mmdet.models')
    torch.manual_seed(0)
    resnet = models.ResNet(
        50,
        base_channels=8,
        out_indices=(3,),
        dcn=dict(type='mmdcn.DCNv2', deform_groups=1),
        stage_with_dcn=(False, True, True, True),
    )
    resnet.eval()
    images = torch.randn(1, 3, 64, 96)
    explanation = torch._dynamo.explain(resnet)(images)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    targets = [node.target for graph in explanation.graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.mmdcn.deform_conv2d.default) == 4 + 6 + 3
    compiled = torch.compile(resnet, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(images), resnet(images))


# Export


class Layer(nn.Module):
    """A call whose weight and bias are parameters."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(call.weight), nn.Parameter(call.bias)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, padding=1, mask=mask)


def layer_call(batch: int, size: tuple[int, int], device: str) -> Call:
    case = Case((4, 6), size, (3, 3), padding=(1, 1), groups=2, offset_groups=2, batch=batch)
    return case.draw(torch.float32, device)


def export(device: str) -> torch.export.ExportedProgram:
    call = layer_call(2, (7, 9), device)
    sizes = {0: Dim('batch', min=1, max=64), 2: Dim('height', min=2, max=256), 3: Dim('width', min=2, max=256)}
    images = (call.input, call.offset, call.mask)
    with torch.no_grad():
        return torch.export.export(Layer(call), images, dynamic_shapes=(sizes, sizes, sizes))


def test_exported_it_stays_one_operator_and_takes_every_size(device: str) -> None:
    program = export(device)
    targets = [node.target for node in program.graph.nodes if node.op == 'call_function']
    assert targets == [torch.ops.mmdcn.deform_conv2d.default]
    parameters = layer_call(2, (7, 9), device)
    for batch, size in ((1, (2, 5)), (3, (9, 9)), (5, (16, 31))):
        call = replace(layer_call(batch, size, device), weight=parameters.weight, bias=parameters.bias)
        actual = program.module()(call.input, call.offset, call.mask)
        torch.testing.assert_close(actual, call(deform_conv2d), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:.isinstance.treespec, LeafSpec:FutureWarning')
def test_aotinductor_compiles_it_and_takes_every_size(device: str, tmp_path: Any) -> None:
    package = torch._inductor.aoti_compile_and_package(export(device), package_path=str(tmp_path / 'layer.pt2'))
    compiled = torch._inductor.aoti_load_package(package)
    parameters = layer_call(2, (7, 9), device)
    for batch, size in ((1, (2, 5)), (3, (9, 9)), (5, (16, 31))):
        call = replace(layer_call(batch, size, device), weight=parameters.weight, bias=parameters.bias)
        with torch.no_grad():
            actual = compiled(call.input, call.offset, call.mask)
        torch.testing.assert_close(actual, call(deform_conv2d))
