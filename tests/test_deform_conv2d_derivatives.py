# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d under every kind of differentiation, and mapped."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from deform_conv2d_cases import (
    CASES,
    Call,
    Case,
    Recorder,
    assert_close,
    draw_grad_output,
    each_subset,
    expected_gradients,
    gradients,
)
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from mmdcn import reference
from mmdcn.ops import deform_conv2d

pytestmark = pytest.mark.usefixtures('one_thread')

CHECK = {'fast_mode': False, 'raise_exception': True}
NAMES = ['input', 'offset', 'mask', 'weight', 'bias']
each_subset_of_names = pytest.mark.parametrize('names', [names for names in each_subset(NAMES) if names], ids='+'.join)


def tiny_case(mask: bool, bias: bool, groups: int, offset_groups: int, non_square: bool) -> Case:
    """A case with few elements, since each costs a full check two calls; an offset of two pixels leaves the image."""
    if non_square:
        return Case((2, 2), (3, 2), (1, 2), (2, 1), (0, 1), (1, 2), groups, offset_groups, 2, mask, bias)
    return Case((2, 2), (3, 3), (2, 2), (2, 2), (1, 1), (1, 1), groups, offset_groups, 1, mask, bias)


CROSS = {
    ' '.join(['mask'] * m + ['bias'] * b + [f'groups={g}', f'offset_groups={og}'] + ['non-square'] * n): tiny_case(
        m, b, g, og, n
    )
    for m, b, g, og, n in product((False, True), (False, True), (1, 2), (1, 2), (False, True))
}
each_cross = pytest.mark.parametrize('case', CROSS.values(), ids=CROSS.keys())
each_cross_without_bias = pytest.mark.parametrize(
    'case',
    [case for case in CROSS.values() if not case.bias],
    ids=[name for name, case in CROSS.items() if not case.bias],
)


def as_function(call: Call) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the call as a function of its tensors, and these tensors."""
    names = list(call.tensors())

    def function(*tensors: Tensor) -> Tensor:
        return replace(call, **dict(zip(names, tensors, strict=True)))(deform_conv2d)

    return function, [tensor.detach().requires_grad_() for tensor in call.tensors().values()]


def channels_last(call: Call) -> Call:
    return call.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


# The reverse mode, to every order


@each_cross
@pytest.mark.parametrize('arrange', [lambda call: call, channels_last], ids=['contiguous', 'channels last'])
def test_gradients_equal_finite_differences(case: Case, arrange: Callable[[Call], Call], device: str) -> None:
    assert gradcheck(*as_function(arrange(case.draw(device=device))), **CHECK)


@each_cross_without_bias  # the output is linear in it
def test_second_derivatives_equal_finite_differences(case: Case, device: str) -> None:
    function, tensors = as_function(case.draw(device=device))
    assert gradgradcheck(function, tensors, **CHECK)


def test_third_derivatives_equal_finite_differences(device: str) -> None:
    function, tensors = as_function(Case((1, 1), (3, 2), (1, 2), batch=1, bias=False).draw(device=device))

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)

    assert gradgradcheck(gradient, tensors, **CHECK)


def test_a_gradient_penalty_trains_with_an_empty_batch(device: str) -> None:
    function, tensors = as_function(CASES['no image'].draw(device=device))
    grads = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors, materialize_grads=True)
    assert [g.shape for g in again] == [t.shape for t in tensors]
    assert not any(g.any() for g in again)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('offset_dtype', [None, torch.float32], ids=['low offsets', 'float32 offsets'])
def test_second_derivatives_exist_in_low_precision(
    dtype: torch.dtype, offset_dtype: torch.dtype | None, device: str
) -> None:
    call = CASES['everything at once'].draw(dtype, device)
    offset_dtype = offset_dtype or dtype
    call = replace(call, offset=call.offset.to(offset_dtype), mask=call.mask.to(offset_dtype))

    def penalty(call: Call, function: Callable[..., Tensor]) -> dict[str, Tensor]:
        call = call.map(lambda tensor: tensor.detach().requires_grad_())
        tensors = list(call.tensors().values())
        grads = torch.autograd.grad(call(function).double().square().sum(), tensors, create_graph=True)
        again = torch.autograd.grad(sum(g.double().square().sum() for g in grads), tensors)
        return dict(zip(call.tensors(), again, strict=True))

    actual, expected = penalty(call, deform_conv2d), penalty(call.map(Tensor.double), reference.deform_conv2d)
    for name, result in actual.items():
        # Output, gradients and their gradients are rounded to the type, one after the other.
        tolerance = 8 * torch.finfo(dtype).eps * expected[name].norm()
        assert (result.double() - expected[name]).norm() < tolerance, name


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_the_backward_of_the_reference_equals_autograd_of_its_forward(case: Case, device: str) -> None:
    call = case.draw(device=device)
    grad_output = draw_grad_output(call)
    expected = expected_gradients(call, grad_output)
    geometry = (call.stride, call.padding, call.dilation)
    grads = reference.deform_conv2d_backward(grad_output, call.input, call.offset, call.mask, call.weight, *geometry)
    actual = dict(zip(('input', 'offset', 'mask', 'weight'), grads, strict=True))
    assert_close({name: result for name, result in actual.items() if result is not None}, expected, call, grad_output)


# The forward mode


@each_cross
def test_tangents_equal_finite_differences(case: Case, device: str) -> None:
    function, tensors = as_function(case.draw(device=device))
    assert gradcheck(function, tensors, check_forward_ad=True, check_backward_ad=False, **CHECK)


def test_forward_over_reverse_equals_finite_differences(device: str) -> None:
    function, tensors = as_function(tiny_case(True, True, 2, 1, True).draw(device=device))
    assert gradgradcheck(
        function, tensors, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False, **CHECK
    )


@each_subset_of_names
def test_a_tangent_of_any_argument_reaches_the_output(names: list[str], device: str) -> None:
    """A finite difference along the tangents, which is exact to the square of its step."""
    call = CASES['everything at once'].draw(device=device)
    generator = torch.Generator().manual_seed(3)
    tangents = {name: torch.randn(call.tensors()[name].shape, generator=generator).to(call.input) for name in names}

    def moved(step: float) -> Call:
        return replace(call, **{name: call.tensors()[name] + step * tangent for name, tangent in tangents.items()})

    expected = (moved(1e-5)(deform_conv2d) - moved(-1e-5)(deform_conv2d)) / 2e-5
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(call.tensors()[name], tangent) for name, tangent in tangents.items()}
        actual = forward_ad.unpack_dual(replace(call, **dual)(deform_conv2d)).tangent
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-7)
    through_func = jvp(
        lambda values: replace(call, **values)(deform_conv2d),
        ({name: call.tensors()[name] for name in names},),
        (tangents,),
    )[1]
    torch.testing.assert_close(through_func, actual)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_tangents_in_low_precision_lose_no_digit_of_a_place(dtype: torch.dtype, device: str) -> None:
    """Of an image that is larger than the type counts pixels in sixteenths."""
    call = Case((2, 3), (4, 70), (1, 2)).draw(dtype, device)

    def tangent(call: Call) -> Tensor:
        ones = {name: torch.ones_like(tensor) for name, tensor in call.tensors().items()}
        return jvp(lambda values: replace(call, **values)(deform_conv2d), (call.tensors(),), (ones,))[1]

    expected = tangent(call.map(Tensor.double))
    assert (tangent(call).double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()


# torch.func


def test_grad_and_vjp_equal_autograd(device: str) -> None:
    call = CASES['everything at once'].draw(device=device)
    grad_output = draw_grad_output(call)
    expected = gradients(deform_conv2d, call, grad_output)
    tensors = call.tensors()
    _, pull_back = vjp(lambda values: replace(call, **values)(deform_conv2d), tensors)
    assert_close(pull_back(grad_output)[0], expected, call, grad_output)
    by_grad = grad(lambda values: (replace(call, **values)(deform_conv2d) * grad_output).sum())(tensors)
    assert_close(by_grad, expected, call, grad_output)


def test_jacrev_equals_jacfwd(device: str) -> None:
    function, tensors = as_function(tiny_case(True, True, 2, 1, True).draw(device=device))
    every = tuple(range(len(tensors)))
    for by_rows, by_columns in zip(
        jacrev(function, argnums=every)(*tensors), jacfwd(function, argnums=every)(*tensors), strict=True
    ):
        torch.testing.assert_close(by_rows, by_columns)


@pytest.mark.parametrize('outer', [jacfwd, jacrev], ids=['forward', 'reverse'])
@pytest.mark.parametrize('inner', [jacfwd, jacrev], ids=['over forward', 'over reverse'])
def test_each_way_to_the_hessian_gives_the_same(
    outer: Callable[..., Any], inner: Callable[..., Any], device: str
) -> None:
    function, tensors = as_function(tiny_case(True, False, 1, 2, False).draw(device=device))

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    every = tuple(range(len(tensors)))
    expected = torch.autograd.functional.hessian(loss, tuple(tensors))
    torch.testing.assert_close(outer(inner(loss, argnums=every), argnums=every)(*tensors), expected)


def test_hessian_of_torch_func_works(device: str) -> None:
    function, tensors = as_function(tiny_case(False, False, 1, 1, True).draw(device=device))
    result = hessian(lambda offset: function(tensors[0], offset, tensors[2]).square().sum())(tensors[1])
    assert result.shape == tensors[1].shape * 2
    torch.testing.assert_close(result, result.movedim((0, 1, 2, 3), (4, 5, 6, 7)))


# vmap


def stack_of_calls(case: Case, names: list[str], device: str) -> tuple[Call, list[Call], dict[str, int | None]]:
    """Return one call with some tensors stacked along odd dimensions, the three calls it holds, and its in_dims."""
    calls = [case.draw(device=device, seed=seed) for seed in range(3)]
    shared = {name: tensor for name, tensor in calls[0].tensors().items() if name not in names}
    calls = [replace(call, **shared) for call in calls]
    dims = {name: (i % (calls[0].tensors()[name].dim() + 1)) for i, name in enumerate(names)}
    mapped = {name: torch.stack([call.tensors()[name] for call in calls], dim) for name, dim in dims.items()}
    in_dims = {name: dims.get(name) for name in calls[0].tensors()}
    return replace(calls[0], **mapped), calls, in_dims


@each_subset_of_names
def test_vmap_over_any_arguments_equals_a_loop(names: list[str], device: str) -> None:
    call, calls, in_dims = stack_of_calls(CASES['everything at once'], names, device)
    output = vmap(lambda values: replace(call, **values)(deform_conv2d), (in_dims,))(call.tensors())
    for one, single in zip(output, calls, strict=True):
        assert_close({'output': one}, {'output': single(deform_conv2d)}, single)


@each_subset_of_names
def test_vmap_runs_the_operator_once(names: list[str], device: str) -> None:
    call, _, in_dims = stack_of_calls(CASES['everything at once'], names, device)
    with Recorder() as recorder:
        vmap(lambda values: replace(call, **values)(deform_conv2d), (in_dims,))(call.tensors())
    assert [name for name, *_ in recorder.calls] == ['deform_conv2d']


@pytest.mark.parametrize('case', ['no mask', 'neither', 'no image', 'groups across offset groups', 'depthwise'])
@pytest.mark.parametrize('names', [['input', 'offset'], ['weight'], ['input', 'weight']], ids='+'.join)
def test_vmap_takes_calls_of_every_kind(case: str, names: list[str], device: str) -> None:
    call, calls, in_dims = stack_of_calls(CASES[case], names, device)
    output = vmap(lambda values: replace(call, **values)(deform_conv2d), (in_dims,))(call.tensors())
    for one, single in zip(output, calls, strict=True):
        assert_close({'output': one}, {'output': single(deform_conv2d)}, single)


@each_subset_of_names
def test_vmap_of_grad_gives_the_gradients_of_each_sample(names: list[str], device: str) -> None:
    call, calls, in_dims = stack_of_calls(CASES['everything at once'], names, device)
    grad_output = draw_grad_output(calls[0])
    loss = grad(lambda values: (replace(call, **values)(deform_conv2d) * grad_output).sum())
    results = vmap(loss, (in_dims,))(call.tensors())
    for i, single in enumerate(calls):
        actual = {name: result[i] for name, result in results.items()}
        assert_close(actual, gradients(deform_conv2d, single, grad_output), single, grad_output)


@each_subset_of_names
def test_grad_through_vmap_equals_the_sum_over_a_loop(names: list[str], device: str) -> None:
    """Of an argument that is not mapped, every sample is a part of the gradient."""
    call, calls, in_dims = stack_of_calls(CASES['everything at once'], names, device)
    call = call.map(lambda tensor: tensor.requires_grad_())
    grad_output = draw_grad_output(calls[0])
    output = vmap(lambda values: replace(call, **values)(deform_conv2d), (in_dims,))(call.tensors())
    actual = dict(
        zip(
            call.tensors(),
            torch.autograd.grad((output * grad_output).sum(), list(call.tensors().values())),
            strict=True,
        )
    )
    single = [gradients(deform_conv2d, one, grad_output) for one in calls]
    expected = {
        name: sum(one[name] for one in single) if dim is None else torch.stack([one[name] for one in single], dim)
        for name, dim in in_dims.items()
    }
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name])


def test_vmap_nests(device: str) -> None:
    call = CASES['everything at once'].draw(device=device)
    factors = torch.arange(1.0, 4, device=device, dtype=torch.float64)

    def scaled(a: Tensor, b: Tensor) -> Tensor:
        return replace(call, input=a * call.input, weight=b * call.weight, bias=None)(deform_conv2d)

    output = vmap(vmap(scaled, (None, 0)), (0, None))(factors, factors)
    plain = replace(call, bias=None)(deform_conv2d)
    torch.testing.assert_close(output, torch.outer(factors, factors)[..., None, None, None, None] * plain)


@pytest.mark.parametrize('output_mask', list(product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize('mapped', [[0], [0, 1, 2, 3], [4], [0, 1, 2, 3, 4]], ids=str)
def test_vmap_of_the_backward_operator_equals_a_loop(
    mapped: list[int], output_mask: tuple[bool, ...], device: str
) -> None:
    calls = [CASES['everything at once'].draw(device=device, seed=seed if mapped != [0] else 0) for seed in range(3)]
    tensors = [[draw_grad_output(c, i), c.input, c.offset, c.mask, c.weight] for i, c in enumerate(calls)]
    tensors = [[t if j in mapped else tensors[0][j] for j, t in enumerate(each)] for each in tensors]
    call = calls[0]
    settings = (call.stride, call.padding, call.dilation, call.groups, 3, output_mask, False)

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.mmdcn.deform_conv2d_backward(*tensors, *settings)

    stacked = [torch.stack(column) if j in mapped else column[0] for j, column in enumerate(zip(*tensors, strict=True))]
    results = vmap(backward, tuple(0 if j in mapped else None for j in range(5)))(*stacked)
    for i, each in enumerate(tensors):
        expected = backward(*each)
        for result, once, needed in zip(results, expected, output_mask, strict=True):
            if needed:
                torch.testing.assert_close(result[i], once)


@pytest.mark.parametrize('names', [['input'], ['weight'], ['offset', 'mask'], NAMES], ids='+'.join)
def test_jvp_of_vmap_and_vmap_of_jvp_agree(names: list[str], device: str) -> None:
    call, calls, in_dims = stack_of_calls(CASES['everything at once'], names, device)

    def function(values: dict[str, Tensor]) -> Tensor:
        return replace(call, **values)(deform_conv2d)

    tangents = {name: torch.ones_like(tensor) for name, tensor in call.tensors().items()}
    outer = jvp(vmap(function, (in_dims,)), (call.tensors(),), (tangents,))[1]
    inner = vmap(lambda v, t: jvp(function, (v,), (t,))[1], (in_dims, in_dims))(call.tensors(), tangents)
    torch.testing.assert_close(outer, inner)
    for one, single in zip(outer, calls, strict=True):
        ones = {name: torch.ones_like(tensor) for name, tensor in single.tensors().items()}
        expected = jvp(lambda v, single=single: replace(single, **v)(deform_conv2d), (single.tensors(),), (ones,))[1]
        torch.testing.assert_close(one, expected)


def test_what_torch_func_vjp_returns_can_be_differentiated_again(device: str) -> None:
    """Its tensors outlive the transform."""
    call = CASES['everything at once'].draw(device=device)
    weight = call.weight.requires_grad_()
    grad_output = draw_grad_output(call)
    _, pull_back = vjp(lambda input: replace(call, input=input)(deform_conv2d), call.input)
    actual = torch.autograd.grad(pull_back(grad_output)[0].square().sum(), weight)[0]
    input = call.input.requires_grad_()
    slope = torch.autograd.grad(call(deform_conv2d), input, grad_output, create_graph=True)[0]
    torch.testing.assert_close(actual, torch.autograd.grad(slope.square().sum(), weight)[0])
