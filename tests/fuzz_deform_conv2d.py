# SPDX-License-Identifier: Apache-2.0
"""Draws whole calls of deform_conv2d and compares them with the reference, mmcv and ONNX Runtime.

python tests/fuzz_deform_conv2d.py --cases 2000
"""

import argparse
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from compiled_mmcv import has_compiled_mmcv
from deform_conv2d_cases import LAYOUTS, Call, Case, assert_close, draw_grad_output, expected_gradients, gradients
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import deform_conv2d

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FAR = (1e4, -1e4, 1e9, torch.inf, -torch.inf)


@dataclass
class Drawn:
    """A call and the gradient of its output."""

    call: Call
    grad_output: Tensor
    description: str

    def __repr__(self) -> str:
        return self.description


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 4))
    channels = groups * draw(st.integers(1, 40 // groups))
    kernel, stride, padding, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(0, 3)), draw(pairs(1, 3))
    positions, left_over = draw(pairs(1, 9)), draw(pairs(0, 2))

    def size(axis: int) -> int:
        span = dilation[axis] * (kernel[axis] - 1) + 1
        return max(1, span + stride[axis] * (positions[axis] - 1) + left_over[axis] - 2 * padding[axis])

    return Case(
        channels=(channels, groups * draw(st.integers(1, 5))),
        size=(size(0), size(1)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0])),
        batch=draw(st.integers(0, 4)),
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def calls(draw: st.DrawFn) -> Drawn:
    case, dtype, number = draw(cases()), draw(st.sampled_from(TYPES)), draw(st.integers(0, 2**32 - 1))
    call = case.draw(dtype, seed=number)
    spread, share = draw(st.sampled_from([0.0, 0.25, 1.0, 5.0])), draw(st.sampled_from([0.0, 0.1]))
    generator = torch.Generator().manual_seed(number)
    far = torch.tensor(FAR, dtype=dtype)[torch.randint(len(FAR), call.offset.shape, generator=generator)]
    is_far = torch.rand(call.offset.shape, generator=generator) < share
    call = replace(call, offset=torch.where(is_far, far, spread * call.offset))
    if dtype in (torch.float16, torch.bfloat16) and draw(st.booleans()):
        call = replace(call, offset=call.offset.float(), mask=None if call.mask is None else call.mask.float())
    layouts = {name: draw(st.sampled_from(sorted(LAYOUTS))) for name in call.tensors() if name != 'bias'}
    arranged = {name: LAYOUTS[layout](getattr(call, name)) for name, layout in layouts.items()}
    grad_layout = draw(st.sampled_from(sorted(LAYOUTS)))
    description = f'{case}, {dtype}, seed={number}, {spread=}, {share=}, {layouts}, {grad_layout=}'
    grad_output = LAYOUTS[grad_layout](draw_grad_output(call, seed=number))
    return Drawn(replace(call, **arranged), grad_output, description)


@dataclass
class Tally:
    """How many cases each peer answered, and the worst relative error among them."""

    cases: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    worst: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, peer: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        self.answered[peer] += 1
        for name, result in actual.items():
            if result.numel() and expected[name].any():
                error = (result.double() - expected[name]).abs().max() / expected[name].abs().max()
                self.worst[peer] = max(self.worst[peer], error.item())

    def __str__(self) -> str:
        peers = [f'{peer:<24} {n:>6} cases  {self.worst[peer]:.1e}' for peer, n in sorted(self.answered.items())]
        return '\n'.join([f'{self.cases} cases; worst error of any result, relative to its largest value:', *peers])


def run_mmcv(drawn: Drawn) -> dict[str, Tensor] | None:
    """Return what mmcv computes, if it can: it has no bfloat16, no empty batch, one layout and one type."""
    if not has_compiled_mmcv():
        return None
    from mmcv.ops import modulated_deform_conv2d

    call = drawn.call.map(Tensor.contiguous)
    if call.input.dtype not in (torch.float64, torch.float32) or len(call.input) == 0:
        return None

    def function(
        input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, **geometry: tuple[int, int]
    ) -> Tensor:
        taps = weight.shape[2] * weight.shape[3]
        groups = (input.shape[1] // weight.shape[1], offset.shape[1] // (2 * taps))
        return modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry.values(), *groups)

    ones = torch.ones_like(call.offset[:, ::2]).contiguous()
    full = replace(call, mask=ones if call.mask is None else call.mask)
    full = replace(full, bias=torch.zeros_like(call.weight[:, 0, 0, 0]) if call.bias is None else call.bias)
    results = gradients(function, full, drawn.grad_output.contiguous())
    return {name: results[name] for name in ('output', *call.tensors())}


def run_onnxruntime(drawn: Drawn) -> dict[str, Tensor] | None:
    """Return the output of ONNX Runtime's DeformConv, if it can: it runs float32 and finite offsets."""
    if any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime')):
        return None
    import onnx
    import onnxruntime

    call = drawn.call
    if call.input.dtype != torch.float32 or len(call.input) == 0 or call.offset.abs().max() > 1e6:
        return None
    tensors = call.tensors()
    order = ['input', 'weight', 'offset', 'bias', 'mask']
    kernel = call.weight.shape[2:]
    node = onnx.helper.make_node(
        'DeformConv',
        [name if name in tensors else '' for name in order],
        ['output'],
        kernel_shape=kernel,
        strides=call.stride,
        pads=call.padding * 2,
        dilations=call.dilation,
        group=call.groups,
        offset_group=call.offset.shape[1] // (2 * kernel.numel()),
    )
    float32 = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(name, float32, tensor.shape) for name, tensor in tensors.items()]
    output = onnx.helper.make_tensor_value_info('output', float32, drawn.grad_output.shape)
    graph = onnx.helper.make_graph([node], 'deform_conv2d', inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    feed = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    return {'output': torch.from_numpy(session.run(None, feed)[0])}


PEERS: dict[str, Callable[[Drawn], dict[str, Tensor] | None]] = {
    'mmcv': run_mmcv,
    'onnxruntime': run_onnxruntime,
}


def check(drawn: Drawn, tally: Tally) -> None:
    """Compare a call with the reference, and the peers with it too: so they and mmdcn agree."""
    call, grad_output = drawn.call, drawn.grad_output
    expected = expected_gradients(call, grad_output)
    actual = gradients(deform_conv2d, call, grad_output)
    tally.cases += 1
    dtype = str(call.input.dtype).removeprefix('torch.')
    tally.add(f'reference, {dtype}', actual, expected)
    assert_close(actual, expected, call, grad_output)
    for name, peer in PEERS.items():
        answer = peer(drawn)
        if answer is not None:
            tally.add(
                f'{name}, {dtype}', {key: actual[key] for key in answer}, {key: t.double() for key, t in answer.items()}
            )
            assert_close(answer, expected, call, grad_output)


def fuzz(count: int, number: int) -> Tally:
    """Check a number of drawn calls."""
    tally = Tally()

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(calls())
    def each(drawn: Drawn) -> None:
        check(drawn, tally)

    each()
    return tally


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=2000, help='how many calls to draw (default: 2000)')
    parser.add_argument('--seed', type=int, default=0, help='where the draws begin (default: 0)')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(fuzz(arguments.cases, arguments.seed))
