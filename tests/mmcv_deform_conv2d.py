# SPDX-License-Identifier: Apache-2.0
"""Makes the calls of docs/operator.md with mmcv's operators, and prints what they do.

python tests/mmcv_deform_conv2d.py
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mmcv
import torch
from deform_conv2d_cases import CASES, LAYOUTS, Call, Case
from mmcv.ops import deform_conv2d, modulated_deform_conv2d
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradgradcheck
from torch.func import grad, jvp, vmap

from mmdcn import reference

LOPSIDED = CASES['everything at once'].draw(torch.float32)
SAME = Case((4, 4), (8, 8), (3, 3), padding=(1, 1)).draw(torch.float32)


def groups_of(call: Call) -> tuple[int, int]:
    return call.groups, call.offset.shape[1] // (2 * call.weight.shape[2] * call.weight.shape[3])


def dcn(call: Call) -> Tensor:
    return deform_conv2d(
        call.input, call.offset, call.weight, call.stride, call.padding, call.dilation, *groups_of(call)
    )


def dcnv2(call: Call) -> Tensor:
    geometry = (call.stride, call.padding, call.dilation, *groups_of(call))
    return modulated_deform_conv2d(call.input, call.offset, call.mask, call.weight, call.bias, *geometry)


def without_mask_and_bias(call: Call) -> Call:
    """The call as DCN can make it, which has neither mask nor bias."""
    return replace(call, mask=None, bias=None)


def error(run: Callable[[Call], Tensor], call: Call) -> str:
    expected = (call if run is dcnv2 else without_mask_and_bias(call)).map(Tensor.double)(reference.deform_conv2d)
    return f'relative error {((run(call).double() - expected).norm() / expected.norm()).item():.1e}'


def check_second_derivatives(run: Callable[[Call], Tensor]) -> str:
    call = Case((1, 1), (3, 2), (1, 2), batch=1).draw()
    call = (call if run is dcnv2 else without_mask_and_bias(call)).map(lambda tensor: tensor.requires_grad_())

    def function(*tensors: Tensor) -> Tensor:
        return run(replace(call, **dict(zip(call.tensors(), tensors, strict=True))))

    right = gradgradcheck(function, list(call.tensors().values()), raise_exception=False)
    return 'right' if right else 'wrong numbers'


def with_offsets(value: float) -> Call:
    return replace(LOPSIDED, offset=torch.full_like(LOPSIDED.offset, value))


def out_of_reach() -> Call:
    """An image whose first pixel is NaN, and offsets that move every sample away from it."""
    call = SAME.map(Tensor.clone)
    call.input[:, :, 0, 0] = torch.nan
    return replace(call, offset=torch.full_like(call.offset, 2.5))


def under_autocast(run: Callable[[Call], Tensor]) -> str:
    with torch.autocast('cpu', torch.bfloat16):
        return f'runs in {run(LOPSIDED).dtype}'


def of_input(run: Callable[[Call], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda input: run(replace(LOPSIDED, input=input))


def with_fake_tensors(run: Callable[[Call], Tensor]) -> Any:
    mode = FakeTensorMode()
    call = LOPSIDED.map(mode.from_tensor)
    with mode:
        return run(call)


PROBES: dict[str, Callable[[Callable[[Call], Tensor]], Any]] = {
    **{
        f'in {dtype}': lambda run, dtype=dtype: error(run, CASES['everything at once'].draw(dtype))
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    'bfloat16 autocast': under_autocast,
    **{
        f'{name} {layout}': lambda run, name=name, layout=layout: error(
            run, replace(LOPSIDED, **{name: LAYOUTS[layout](getattr(LOPSIDED, name))})
        )
        for name in ('input', 'offset', 'weight')
        for layout in ('channels last', 'sliced', 'transposed')
    },
    'no image': lambda run: run(CASES['no image'].draw()),
    '33 images': lambda run: error(run, CASES['33 images'].draw()),
    'input smaller than the kernel': lambda run: error(run, CASES['input smaller than the kernel'].draw()),
    'NaN offsets give NaN': lambda run: run(with_offsets(torch.nan)).isnan().any().item(),
    'infinite offsets give a finite output': lambda run: run(with_offsets(torch.inf)).isfinite().all().item(),
    'a NaN pixel out of reach stays there': lambda run: run(out_of_reach()).isfinite().all().item(),
    'second order': check_second_derivatives,
    'forward mode': lambda run: jvp(of_input(run), (LOPSIDED.input,), (LOPSIDED.input,)),
    'torch.func.grad': lambda run: grad(lambda input: of_input(run)(input).sum())(LOPSIDED.input),
    'vmap': lambda run: vmap(of_input(run))(LOPSIDED.input[None]),
    'torch.compile(fullgraph=True)': lambda run: torch.compile(of_input(run), fullgraph=True, backend='eager')(
        LOPSIDED.input
    ),
    'fake tensors': with_fake_tensors,
    '3 offset groups for 4 channels': lambda run: run(
        Case((4, 4), (5, 5), (3, 3), padding=(1, 1), offset_groups=3).draw(torch.float32)
    ),
    'offsets of half the size': lambda run: run(replace(SAME, offset=SAME.offset[..., :4, :4].contiguous())),
    'stride 0': lambda run: run(replace(SAME, stride=(0, 0))),
    'weight for other channels': lambda run: run(replace(SAME, weight=torch.zeros(4, 3, 3, 3))),
    'weight in double': lambda run: run(replace(SAME, weight=SAME.weight.double())),
}


def outcome(probe: Callable[..., Any], run: Callable[[Call], Tensor]) -> str:
    try:
        result = probe(run)
    except Exception as error:
        return f'{type(error).__name__}: {str(error).splitlines()[0][:90]}'
    return f'gives a {result.dtype} tensor {list(result.shape)}' if isinstance(result, Tensor) else str(result)


if __name__ == '__main__':
    print(f'mmcv {mmcv.__version__}, torch {torch.__version__}')
    for name, probe in PROBES.items():
        print(f'{name}\n    DCN:   {outcome(probe, dcn)}\n    DCNv2: {outcome(probe, dcnv2)}')
