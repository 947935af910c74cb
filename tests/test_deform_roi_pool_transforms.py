# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_roi_pool: derivatives, vmap, torch.library and torch.compile, on every device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from deform_conv2d_cases import Recorder
from deform_roi_pool_cases import CASES, Call, Case, draw_grad_output, each_dtype, gradients
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, vmap

from mmdcn.ops import deform_roi_pool


def as_function(call: Call) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the pooling as a function of the tensors that have gradients, and these tensors."""
    names = list(call.tensors())

    def function(*tensors: Tensor) -> Tensor:
        return replace(call, **dict(zip(names, tensors, strict=True)))(deform_roi_pool)

    return function, tuple(call.tensors().values())


TINY = Case(channels=2, size=(4, 3), rois=2, bins=(1, 2))


@pytest.mark.parametrize('case', [TINY, replace(TINY, offset=False), replace(TINY, sampling_ratio=2)], ids=str)
def test_first_and_second_derivatives_are_those_of_finite_differences(case: Case, device: str) -> None:
    function, tensors = as_function(case.draw(device=device).map(lambda tensor: tensor.requires_grad_()))
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_regions_get_no_gradient(device: str) -> None:
    call = CASES['defaults'].draw(device=device).map(lambda tensor: tensor.requires_grad_())
    grads = torch.autograd.grad(call(deform_roi_pool).sum(), [call.rois, call.input], allow_unused=True)
    assert grads[0] is None


def test_jacrev_equals_jacfwd_and_the_hessian_that_of_autograd(device: str) -> None:
    function, tensors = as_function(TINY.draw(device=device))
    for rows, columns in zip(
        jacrev(function, argnums=(0, 1))(*tensors), jacfwd(function, argnums=(0, 1))(*tensors), strict=True
    ):
        torch.testing.assert_close(rows, columns)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    torch.testing.assert_close(
        hessian(loss, argnums=(0, 1))(*tensors), torch.autograd.functional.hessian(loss, tensors)
    )


def test_a_tangent_in_eager_mode_reaches_the_output(device: str) -> None:
    function, tensors = as_function(TINY.draw(device=device))
    tangents = [torch.randn_like(tensor) for tensor in tensors]

    def moved(step: float) -> Tensor:
        return function(*(tensor + step * tangent for tensor, tangent in zip(tensors, tangents, strict=True)))

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    with forward_ad.dual_level():
        output = function(*map(forward_ad.make_dual, tensors, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('names', [['input'], ['rois'], ['offset'], ['input', 'rois', 'offset']], ids='+'.join)
@each_dtype
def test_vmap_equals_a_loop_and_runs_the_operator_once(names: list[str], dtype: torch.dtype, device: str) -> None:
    calls = [CASES['defaults'].draw(dtype, device, seed) for seed in range(3)]
    arguments = ('input', 'rois', 'offset')
    shared = {name: getattr(calls[0], name) for name in arguments if name not in names}
    calls = [replace(call, **shared) for call in calls]
    dims = [i % 2 if name in names else None for i, name in enumerate(arguments)]
    values = [
        getattr(calls[0], name) if dim is None else torch.stack([getattr(call, name) for call in calls], dim)
        for name, dim in zip(arguments, dims, strict=True)
    ]
    with Recorder() as recorder:
        outputs = vmap(
            lambda *tensors: replace(calls[0], **dict(zip(arguments, tensors, strict=True)))(deform_roi_pool),
            in_dims=tuple(dims),
        )(*values)
    assert len(recorder.calls) == 1
    for output, call in zip(outputs, calls, strict=True):
        torch.testing.assert_close(output, call(deform_roi_pool))


# torch.library and torch.compile


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('name', ['defaults', 'no offsets', 'no region'])
def test_opcheck_is_clean(name: str, memory_format: torch.memory_format, device: str) -> None:
    call = CASES[name].draw(device=device)
    call = replace(call, input=call.input.contiguous(memory_format=memory_format))
    settings = (call.spatial_scale, call.sampling_ratio, call.gamma)
    leaves = call.map(lambda tensor: tensor.requires_grad_())
    arguments = (leaves.input, call.rois.detach(), leaves.offset, call.output_size, *settings)
    torch.library.opcheck(torch.ops.mmdcn.deform_roi_pool, arguments)
    needed = (True, call.offset is not None)
    arguments = (draw_grad_output(call), call.input.detach(), call.rois.detach(), call.offset, *settings, needed, False)
    torch.library.opcheck(
        torch.ops.mmdcn.deform_roi_pool_backward,
        tuple(argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments),
    )


def test_any_number_of_regions_runs_in_one_graph(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(deform_roi_pool, fullgraph=True, dynamic=True, backend='aot_eager')
    for rois in (5, 9, 2):
        call = replace(CASES['defaults'], rois=rois).draw(torch.float32, device)
        grad_output = draw_grad_output(call)
        actual = gradients(compiled, call, grad_output)
        for name, expected in gradients(deform_roi_pool, call, grad_output).items():
            torch.testing.assert_close(actual[name], expected)


@pytest.mark.parametrize('number', [-1, 2])
def test_vmap_takes_no_region_from_the_images_of_another_call(number: int) -> None:
    images, rois = torch.randn(2, 2, 3, 7, 8), torch.tensor([[[0.0, 1, 1, 6, 6]], [[1.0, 1, 1, 6, 6]]])
    rois[1 if number < 0 else 0, 0, 0] = number
    with pytest.raises(RuntimeError, match='must be the number of an image'):
        vmap(lambda image, regions: deform_roi_pool(image, regions, None, 2))(images, rois)


def test_forward_mode_refuses_what_the_operator_refuses() -> None:
    image, rois = torch.randn(2, 3, 7, 8), torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'^rois must be of type'):
        torch.func.jvp(lambda image: deform_roi_pool(image, rois, None, 2), (image,), (image,))
