# SPDX-License-Identifier: Apache-2.0
"""The CUDA source, run by the host: all of it but the files that have a twin in cuda_host, which are put over them.

The twin runs the warps of a block in an order drawn from MMDCN_HOST_SEED, and refuses unaligned vectors. It multiplies
fragments of matrices as the tensor cores of MMDCN_HOST_CAPABILITY do. What needs a GPU (the launches, torch's products)
is tested where there is one.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import deform_roi_pool_cases as roi_pool
import pytest
import torch
from deform_conv2d_cases import AT_ONCE, CASES, Case, draw_grad_output
from nms_cases import draw as draw_boxes
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
CALLS = {name: CASES[name] for name in ('everything at once', 'depthwise', 'groups across offset groups', 'no image')}
CALLS['neither'] = CASES['neither']
# One that a warp moves over in vectors, with lanes to spare.
CALLS['wide'] = Case((48, 6), (5, 7), (3, 2), padding=(1, 1), groups=2, offset_groups=2)
# Those that groups of 16 lanes, a warp, and a warp more than once move over in vectors of half types.
CALLS['half a warp wide'] = Case((72, 2), (3, 4), (2, 1))
CALLS['a warp wide'] = Case((136, 3), (3, 4), (1, 2))
CALLS['wider than a warp'] = Case((264, 2), (4, 3), (1, 2))
# One whose taps are those of two thread blocks.
CALLS['many taps'] = Case((8, 2), (6, 5), (2, 7), padding=(1, 3), offset_groups=2)
# One whose tiles are whole rows, wider than a patch.
CALLS['patches'] = Case((8, 2), (9, 10), (2, 3), padding=(1, 1))
# For each form of the fused kernels: several tiles of positions and of channels, offset groups, a step alone.
FUSED = {
    '64 channels': Case((256, 64), (9, 10), (3, 2), padding=(1, 1), offset_groups=2),
    'thrice 64 channels': Case((64, 192), (9, 8), (2, 3), (2, 1), (1, 2), (1, 2), bias=False),
    '128 channels': Case((64, 128), (10, 11), (3, 3), padding=(1, 1)),
    '256 channels': Case((128, 256), (9, 8), (1, 3), padding=(0, 1), mask=False),
    'one step': Case((64, 64), (3, 4), (1, 1), batch=1),
}
# Calls that the kernel of AT_ONCE cannot take: without vectors, with more than a warp has lanes, with too few taps.
NOT_AT_ONCE = {
    '10 channels': Case((10, 3), (5, 6), (3, 3), padding=(1, 1)),
    '264 channels': Case((264, 2), (4, 3), (3, 3), padding=(1, 1)),
    '2 taps': Case((16, 3), (5, 6), (1, 2)),
}
TENSOR_CORES = ('8.0', '9.0', '9.0 new')  # the compute capability, and MMDCN_CUDA_KERNELS
ROI_CASES = roi_pool.CASES | roi_pool.LARGE
# Of input, offset and weight; one without a mask has no other gradient in the last row.
NEEDED = ((True, True, True), (True, False, False), (False, True, False), (False, False, True))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the CUDA source into operators of the CPU, with tiles of few positions."""
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('there is no g++')
    csrc = shutil.copytree(ROOT / 'csrc', tmp_path_factory.mktemp('cuda_host') / 'csrc')
    shutil.copytree(ROOT / 'tests/cuda_host', csrc, dirs_exist_ok=True)
    sources = [*(csrc / 'cuda').glob('*.cu'), *(csrc / 'ops').glob('*.cpp')]
    library = csrc / 'host.so'
    subprocess.run(
        [
            compiler,
            '-std=c++20',
            '-O1',
            '-w',
            '-shared',
            '-fPIC',
            '-U_FORTIFY_SOURCE',  # which takes a jump to another stack for an error
            '-fvisibility=hidden',
            '-fsanitize=alignment',  # a GPU faults where a vector is not aligned
            '-fno-sanitize-recover=alignment',
            '-DTORCH_TARGET_VERSION=0x020a000000000000',
            *(f'-isystem{path}' for path in include_paths()),
            '-xc++',
            *sources,
            f'-o{library}',
            *(f'-L{path}' for path in library_paths()),
            '-ltorch_cpu',
        ],
        check=True,
    )
    torch.ops.load_library(library)
    return library


@pytest.fixture
def host(library: Path) -> object:
    return torch.ops.mmdcn_host


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('name', CALLS)
def test_deform_conv2d_equals_the_cpu(
    host: object, name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    case = CALLS[name]
    call = case.draw(dtype).map(lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t)
    if call.offset.numel():
        call.offset[0, 0, 0, 0], call.offset[0, -1, -1, -1] = torch.inf, torch.nan
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    images = (call.input, call.offset, call.mask, call.weight)
    _compare(
        [ops.deform_conv2d(*images, call.bias, *geometry) for ops in (host, torch.ops.mmdcn)],
        TOLERANCES[dtype],
    )
    grad_output = draw_grad_output(call).to(dtype)
    for (needs_input, needs_offset, needs_weight), deterministic in product(NEEDED, (False, True)):
        needed = (needs_input, needs_offset, case.mask, needs_weight)
        arguments = (grad_output, *images, *geometry, needed, deterministic)
        gradients = (ops.deform_conv2d_backward(*arguments) for ops in (host, torch.ops.mmdcn))
        for pair in zip(*gradients, strict=True):
            _compare(pair, TOLERANCES[dtype])


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('name', ['patches', 'many taps', 'groups across offset groups', 'wider than a warp'])
def test_deform_conv2d_gives_the_same_for_any_order_of_warps(
    host: object, name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, dtype = CALLS[name], torch.float32
    call = case.draw(dtype)
    images = (call.input, call.offset, call.mask, call.weight)
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    arguments = (draw_grad_output(call), *images, *geometry)

    def results(deterministic: bool) -> list[torch.Tensor]:
        output = host.deform_conv2d(*images, call.bias, *geometry)
        gradients = host.deform_conv2d_backward(*arguments, (True, True, True, True), deterministic)
        alone = host.deform_conv2d_backward(*arguments, (False, True, True, False), deterministic)
        return [output, *gradients, *alone[1:3]]

    expected, deterministic = results(False), results(True)
    monkeypatch.setenv('MMDCN_HOST_SEED', f'{seed + 1}')
    for pair in zip(results(False), expected, strict=True):
        _compare(pair, TOLERANCES[dtype])
    for actual, expected in zip(results(True), deterministic, strict=True):
        assert torch.equal(actual, expected)


def test_deform_conv2d_adds_up_the_samples_of_a_block_in_a_fixed_order(
    host: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((5, 3), (4, 5), (3, 3), padding=(1, 1), batch=1)
    call = case.draw(torch.float32)
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    arguments = (draw_grad_output(call), call.input, call.offset, call.mask, call.weight, *geometry)
    gradients = []
    for seed in range(0, 12, 2):  # those of a device that wants few blocks
        monkeypatch.setenv('MMDCN_HOST_SEED', f'{seed}')
        gradients.append(host.deform_conv2d_backward(*arguments, (True, False, False, False), False)[0])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', [*AT_ONCE, *NOT_AT_ONCE])
def test_deform_conv2d_computes_gradients_at_once_where_it_can(
    host: object,
    library: Path,
    name: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = (AT_ONCE | NOT_AT_ONCE)[name]
    call = case.draw(dtype)
    call.offset[0, 0, 0, 0], call.offset[0, -1, -1, -1], call.input[0, 3, 1, 2] = torch.inf, torch.nan, torch.nan
    images = (tensor.contiguous(memory_format=memory_format) for tensor in (draw_grad_output(call), call.input))
    places = (call.offset.float(), None if call.mask is None else call.mask.float())  # as under autocast
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    arguments = (*images, *places, call.weight, *geometry)
    launches = ctypes.c_uint32.in_dll(ctypes.CDLL(library), 'mmdcn_host_launches_of_warps')
    counts, needed = [], (True, True, case.mask, True)
    monkeypatch.setenv('MMDCN_HOST_SEED', f'{seed}')
    for kernels in ('tested', 'new'):
        monkeypatch.setenv('MMDCN_CUDA_KERNELS', kernels)
        before = launches.value
        gradients = (ops.deform_conv2d_backward(*arguments, needed, False) for ops in (host, torch.ops.mmdcn))
        for pair in zip(*gradients, strict=True):
            _compare(pair, TOLERANCES[dtype])
        counts.append(launches.value - before)
    assert counts[0] == counts[1] * (2 if name in AT_ONCE else 1)


@pytest.mark.parametrize('dtype', TOLERANCES)
def test_deform_conv2d_reads_no_unaligned_vector(host: object, dtype: torch.dtype) -> None:
    call = CALLS['a warp wide'].draw(dtype)

    def unaligned(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.movedim(1, -1)
        return tensor.new_empty(tensor.numel() + 1)[1:].view(rows.shape).copy_(rows).movedim(-1, 1)

    geometry = (call.stride, call.padding, call.dilation, 1, 1)
    images = (call.input, call.offset, call.mask, call.weight)
    odd = tuple(map(unaligned, images))
    outputs = [host.deform_conv2d(*tensors, call.bias, *geometry).contiguous() for tensors in (odd, images)]
    _compare(outputs, TOLERANCES[dtype])
    grad_output = draw_grad_output(call)
    gradients = (
        host.deform_conv2d_backward(grad, *tensors, *geometry, (True, True, True, True), False)
        for grad, tensors in ((unaligned(grad_output), odd), (grad_output, images))
    )
    for actual, expected in zip(*gradients, strict=True):
        _compare((actual.contiguous(), expected.contiguous()), TOLERANCES[dtype])


@pytest.mark.parametrize(
    ('dtype', 'finite', 'seed'),
    [(torch.bfloat16, True, 0), (torch.float16, False, 3), (torch.float16, True, 5), (torch.bfloat16, False, 6)],
)
@pytest.mark.parametrize(
    ('kernels', 'name'),
    [*product(TENSOR_CORES, FUSED), ('8.6', '256 channels')],  # 8.6 has no room for the form of 256 columns
)
def test_deform_conv2d_on_tensor_cores_equals_the_cpu(
    host: object,
    library: Path,
    name: str,
    dtype: torch.dtype,
    finite: bool,
    kernels: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _choose(monkeypatch, kernels)
    monkeypatch.setenv('MMDCN_HOST_SEED', f'{seed}')
    case = FUSED[name]
    call = case.draw(dtype)
    call.offset[0, 0, 0, 0] = torch.inf
    if not finite:
        call.offset[0, -1, -1, -1], call.input[0, 3, 1, 2] = torch.nan, torch.nan
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    arguments = (call.input, call.offset, call.mask, call.weight, call.bias, *geometry)
    launches = ctypes.c_uint32.in_dll(ctypes.CDLL(library), 'mmdcn_host_launches')
    before = launches.value
    actual, expected = (ops.deform_conv2d(*arguments) for ops in (host, torch.ops.mmdcn))
    assert launches.value > before
    assert expected.isfinite().all() if finite else 0 < expected.isnan().sum() < expected.numel()
    _compare((actual, expected), TOLERANCES[dtype])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kernels', TENSOR_CORES)
def test_tensor_cores_get_samples_that_are_rounded_once(
    host: object, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the corners are not rounded to a half type."""
    _choose(monkeypatch, kernels)
    call = Case((64, 64), (9, 8), (1, 1), bias=False).draw(dtype)
    input, mask = 1 + call.input.abs(), 0.5 + call.mask.abs()  # no sum cancels
    identity = torch.eye(64, dtype=dtype)[:, :, None, None]  # which makes the samples the output
    geometry = ((1, 1), (0, 0), (1, 1), 1, 1)
    actual = host.deform_conv2d(input, call.offset.float(), mask.float(), identity, None, *geometry)
    in_double = (tensor.double() for tensor in (input, call.offset, mask, identity))
    expected = torch.ops.mmdcn.deform_conv2d(*in_double, None, *geometry)
    # Half a unit in the last place, and the errors of the corners' weights and of their sum.
    tolerance = torch.finfo(dtype).eps / 2 + 2**-16
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('name', ROI_CASES)
def test_deform_roi_pool_equals_the_cpu(
    host: object, name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    call = ROI_CASES[name].draw(dtype)
    images = call.input.contiguous(memory_format=memory_format)
    if len(call.rois):
        call.rois[1, 3] = torch.nan
    if call.offset is not None and len(call.rois):
        call.offset[2, 0, 0, 0], call.offset[3, 1, 0, 0] = torch.nan, torch.inf
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    arguments = (images, call.rois, call.offset)
    _compare(
        [ops.deform_roi_pool(*arguments, call.output_size, *settings, call.aligned) for ops in (host, torch.ops.mmdcn)],
        TOLERANCES[dtype],
    )
    grad_output = roi_pool.draw_grad_output(call)
    for needed, deterministic in product(((True, True), (True, False), (False, True)), (False, True)):
        needed = (needed[0], needed[1] and call.offset is not None)
        gradients = (
            ops.deform_roi_pool_backward(grad_output, *arguments, *settings, needed, deterministic, call.aligned)
            for ops in (host, torch.ops.mmdcn)
        )
        for pair in zip(*gradients, strict=True):
            _compare(pair, TOLERANCES[dtype])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('name', ['vectors of channels', 'one bin of vectors'])
def test_deform_roi_pool_takes_tensors_that_begin_between_vectors(
    host: object, name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    call = roi_pool.CASES[name].draw(dtype)
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    tensors = [call.input.contiguous(memory_format=memory_format), call.rois, call.offset]
    tensors.append(roi_pool.draw_grad_output(call).contiguous(memory_format=memory_format))
    for i in range(len(tensors)):
        moved = [roi_pool.between_vectors(tensor) if i == j else tensor for j, tensor in enumerate(tensors)]
        results = []
        for ops in (host, torch.ops.mmdcn):
            output = ops.deform_roi_pool(*moved[:3], call.output_size, *settings)
            gradients = ops.deform_roi_pool_backward(moved[3], *moved[:3], *settings, (True, True), False)
            results.append((output, *gradients))
        for pair in zip(*results, strict=True):
            _compare(pair, TOLERANCES[dtype])


@pytest.mark.parametrize('bins', [(3, 1), (1, 3), (1, 1)])
def test_deform_roi_pool_takes_any_stride_of_a_dimension_of_one(host: object, bins: tuple[int, int]) -> None:
    call = roi_pool.Case(bins=bins).draw()
    grad_output = roi_pool.draw_grad_output(call)
    strides = [1000 if grad_output.size(dim) == 1 else grad_output.stride(dim) for dim in range(4)]
    grad_output = grad_output.as_strided(grad_output.shape, strides)
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    arguments = (grad_output, call.input, call.rois, call.offset, *settings, (True, True), False)
    gradients = (ops.deform_roi_pool_backward(*arguments) for ops in (host, torch.ops.mmdcn))
    for pair in zip(*gradients, strict=True):
        _compare(pair, TOLERANCES[torch.float64])


def test_deform_conv2d_calls_torch_for_memory_only(host: object) -> None:
    """However many tiles there are."""
    case = Case((8, 4), (9, 10), (3, 3), padding=(1, 1), batch=3)
    call = case.draw(torch.float32)
    geometry = (call.stride, call.padding, call.dilation, call.groups, case.offset_groups)
    images = (call.input, call.offset, call.mask, call.weight)
    grad_output, needed = draw_grad_output(call), (True, True, True, True)
    forward = _calls(lambda: host.deform_conv2d(*images, call.bias, *geometry))
    backward = _calls(lambda: host.deform_conv2d_backward(grad_output, *images, *geometry, needed, False))
    # The output and the workspace; the four gradients and the workspace.
    assert (forward, backward) == (['aten::empty'] * 2, ['aten::empty'] * 5)


def test_deform_roi_pool_calls_torch_for_memory_only(host: object) -> None:
    """A call costs the host some microseconds."""
    call = roi_pool.CASES['several blocks of channels'].draw(torch.float32)
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    places = (call.input, call.rois, call.offset)
    grad_output = roi_pool.draw_grad_output(call)
    forward = _calls(lambda: host.deform_roi_pool(*places, call.output_size, *settings))
    backward = _calls(lambda: host.deform_roi_pool_backward(grad_output, *places, *settings, (True, True), False))
    # The output; both gradients, what is known of the bins, and the parts of a sum.
    assert (forward, backward) == (['aten::empty'], ['aten::empty'] * 4)


def test_deform_roi_pool_gives_nan_for_a_region_of_no_image(host: object) -> None:
    call = roi_pool.CASES['defaults'].draw()
    call.rois[3, 0] = 2
    settings = (call.output_size, call.spatial_scale, call.sampling_ratio, call.gamma)
    output = host.deform_roi_pool(call.input, call.rois, call.offset, *settings)
    assert output.isnan().flatten(1).all(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize('count', [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('seed', range(2))
def test_nms_keeps_what_the_cpu_keeps(
    host: object, count: int, offset: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('MMDCN_HOST_SEED', f'{seed}')
    for dtype, threshold in product((torch.float32, torch.float64), (0.0, 0.3, 0.5)):
        boxes, scores = draw_boxes(count, dtype=dtype)
        kept = [ops.nms(boxes, scores, threshold, offset) for ops in (host, torch.ops.mmdcn)]
        assert torch.equal(*kept)


def _choose(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """Choose the kernels of a compute capability, and perhaps those that have not run on a GPU."""
    capability, _, new = kernels.partition(' ')
    monkeypatch.setenv('MMDCN_HOST_CAPABILITY', capability.replace('.', ''))
    monkeypatch.setenv('MMDCN_CUDA_KERNELS', new)


def _calls(run: Callable[[], object]) -> list[str]:
    """Get the names of torch's operators that a call makes."""
    with torch.profiler.profile() as profile:
        run()
    return [event.name for event in profile.events() if event.name.startswith('aten::')]


def _compare(pair: object, tolerance: float) -> None:
    actual, expected = pair
    assert actual.stride() == expected.stride()
    scale = 1 + expected.double().nan_to_num(0).abs().max().item() if expected.numel() else 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True)
