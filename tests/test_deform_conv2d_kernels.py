# SPDX-License-Identifier: Apache-2.0
"""On a GPU with tensor cores: the fused kernels, for which the other tests are too small, and the kernels that
MMDCN_CUDA_KERNELS=new turns on. tests/test_cuda_host.py runs them without a GPU.
"""

import pytest
import torch
from deform_conv2d_cases import AT_ONCE, Call, Case, draw_grad_output

from mmdcn.ops import deform_conv2d

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason='torch finds no CUDA device with tensor cores for bfloat16',
)
# One for each number of output channels of a block, with enough positions for the multiprocessors of an H100.
FUSED = {
    '64 channels': Case((128, 64), (81, 83), (3, 2), (1, 1), (1, 2), (2, 1), offset_groups=2),
    'one step': Case((64, 64), (71, 72), (1, 1)),
    '128 channels': Case((64, 128), (107, 90), (3, 3), padding=(1, 1)),
    '256 channels': Case((64, 256), (141, 155), (1, 3), (2, 1), (0, 1), mask=False, bias=False),
}

# With patches of 32 positions too, which need as many.
LARGE_AT_ONCE = AT_ONCE | {'whole patches': Case((32, 3), (72, 64), (3, 3), padding=(1, 1))}
LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(params=['tested', 'new'])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that passed their tests on a GPU, and those that have not run there."""
    monkeypatch.setenv('MMDCN_CUDA_KERNELS', request.param)


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('finite', [True, False], ids=['finite', 'not finite'])
@pytest.mark.parametrize('dtype', LOW, ids=str)
@pytest.mark.parametrize('name', FUSED)
def test_fused_kernels_on_cuda_equal_the_cpu(name: str, dtype: torch.dtype, finite: bool) -> None:
    call = FUSED[name].draw(dtype)
    call.offset[0, 0, 0, 0] = torch.inf
    if not finite:
        call.offset[0, -1, -1, -1], call.input[0, 3, 1, 2], call.input[1, 5, 7, 9] = torch.nan, torch.nan, torch.inf
    expected = call.map(torch.Tensor.float)(deform_conv2d)
    actual = call.map(torch.Tensor.cuda)(deform_conv2d).cpu().float()
    # The samples and the output are rounded; the error of a sum of rounded samples stays within some deviations.
    eps, deviation = torch.finfo(dtype).eps, expected[expected.isfinite()].std().item()
    torch.testing.assert_close(actual, expected, rtol=eps, atol=4 * eps * deviation, equal_nan=True)


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('dtype', LOW, ids=str)
@pytest.mark.parametrize('name', FUSED)
def test_these_calls_run_fused_kernels_on_cuda(name: str, dtype: torch.dtype) -> None:
    call = FUSED[name].draw(dtype, 'cuda')
    with torch.profiler.profile() as profile:
        call(deform_conv2d)
    assert any('fused' in event.name for event in profile.events())


@pytest.mark.parametrize('dtype', [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize('name', LARGE_AT_ONCE)
def test_gradients_at_once_on_cuda_equal_the_cpu(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('MMDCN_CUDA_KERNELS', 'new')
    case = LARGE_AT_ONCE[name]
    call = case.draw(dtype)
    call.offset[0, 0, 0, 0], call.offset[0, -1, -1, -1], call.input[0, 3, 1, 2] = torch.inf, torch.nan, torch.nan
    expected, actual = (_gradients(case, call.map(change)) for change in (torch.Tensor.float, torch.Tensor.cuda))
    for one, other in zip(actual, expected, strict=True):
        _compare(one.cpu().float(), other, dtype)


@pytest.mark.parametrize('name', LARGE_AT_ONCE)
def test_one_kernel_computes_these_gradients_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMDCN_CUDA_KERNELS', 'new')
    case = LARGE_AT_ONCE[name]
    with torch.profiler.profile() as profile:
        _gradients(case, case.draw(torch.float16, 'cuda'))
    assert any('Backpropagate' in event.name for event in profile.events())


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('dtype', [torch.float32, *LOW], ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    call = FUSED['128 channels'].draw(dtype, 'cuda').map(torch.Tensor.requires_grad_)
    tensors, grad_output = tuple(call.tensors().values()), draw_grad_output(call)

    def step() -> tuple[torch.Tensor, ...]:
        output = call(deform_conv2d)
        return output, *torch.autograd.grad(output, tensors, grad_output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what is done once only must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for tensor in (*tensors, grad_output):
            tensor.copy_(tensor.flip(0))
    graph.replay()
    for one, other in zip(replayed, step(), strict=True):
        _compare(one, other, dtype)


def _gradients(case: Case, call: Call) -> tuple[torch.Tensor, ...]:
    tensors = (draw_grad_output(call), call.input, call.offset, call.mask, call.weight)
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    return torch.ops.mmdcn.deform_conv2d_backward(*tensors, *geometry, (True, True, case.mask, True), False)


def _compare(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare sums; in half types their factors and they themselves are rounded, in float32 each partial sum."""
    scale = expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0
    tolerance = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * (1 + scale), equal_nan=True)
