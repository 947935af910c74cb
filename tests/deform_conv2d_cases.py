# SPDX-License-Identifier: Apache-2.0
"""The calls of deform_conv2d that its tests share, and how they are compared.

Note: [Exact places]
Offsets are drawn as whole sixteenths of a pixel, never nearer than an eighth to a whole one. Every
floating type holds them exactly, and a sum with a position too; so a low-precision operator samples
at the very places of the float64 reference, none of them lies where a derivative jumps, and no
finite difference steps over such a place.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdcn import reference
from mmdcn.ops import deform_conv2d
from mmdcn.reference.conv2d import output_shape

Pair = tuple[int, int]
EXACT = {'rtol': 0, 'atol': 0}


@dataclass(frozen=True)
class Call:
    """The arguments of deform_conv2d."""

    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    mask: Tensor | None

    def __call__(self, function: Callable[..., Tensor]) -> Tensor:
        return function(**{field.name: getattr(self, field.name) for field in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> 'Call':
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def zero_offsets(self) -> 'Call':
        return replace(self, offset=torch.zeros_like(self.offset), mask=None)

    @property
    def groups(self) -> int:
        return self.input.shape[1] // self.weight.shape[1]


@dataclass(frozen=True)
class Case:
    """The sizes of a call; no two sizes agree that need not."""

    channels: Pair  # in, out
    size: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    batch: int = 2
    mask: bool = True
    bias: bool = True

    @property
    def out_size(self) -> Pair:
        return output_shape(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def draw(self, dtype: torch.dtype = torch.float64, device: str | torch.device = 'cpu', seed: int = 0) -> Call:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        samples = self.offset_groups * self.taps
        whole = torch.randint(-2, 3, (self.batch, 2 * samples, *self.out_size), generator=generator)
        sixteenths = torch.randint(2, 15, whole.shape, generator=generator)
        call = Call(
            input=normal(self.batch, self.channels[0], *self.size),
            offset=(whole + sixteenths / 16).double(),
            weight=normal(self.channels[1], self.channels[0] // self.groups, *self.kernel),
            bias=normal(self.channels[1]) if self.bias else None,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=normal(self.batch, samples, *self.out_size).sigmoid() if self.mask else None,
        )
        return call.map(lambda tensor: tensor.to(device, dtype))


CASES = {
    'defaults': Case((2, 3), (7, 5), (3, 2)),
    'no mask': Case((2, 3), (7, 5), (3, 2), mask=False),
    'no bias': Case((3, 2), (5, 6), (2, 3), bias=False),
    'neither': Case((3, 2), (5, 6), (2, 3), mask=False, bias=False),
    'one-pixel kernel': Case((4, 6), (5, 7), (1, 1), groups=2, offset_groups=4),
    'one output position': Case((3, 2), (3, 2), (3, 2)),
    'input smaller than the kernel': Case((2, 3), (2, 1), (5, 4), padding=(3, 2)),
    'one pixel': Case((2, 3), (1, 1), (3, 3), padding=(1, 1)),
    'stride': Case((2, 3), (9, 8), (3, 2), stride=(2, 3), padding=(1, 0)),
    'stride skips pixels': Case((2, 3), (8, 9), (1, 2), stride=(3, 4)),
    'padding': Case((2, 3), (4, 5), (3, 2), padding=(3, 4)),
    'dilation': Case((2, 5), (9, 8), (3, 2), padding=(3, 2), dilation=(2, 3)),
    'everything at once': Case((6, 4), (9, 8), (3, 2), (2, 1), (1, 2), (2, 3), 2, 3),
    'depthwise': Case((4, 8), (5, 6), (3, 2), padding=(1, 0), groups=4),
    'one filter for each channel': Case((70, 70), (5, 6), (3, 2), padding=(1, 0), groups=70, offset_groups=5),
    'own offsets for each channel': Case((4, 3), (5, 6), (2, 3), offset_groups=4),
    'offset groups within groups': Case((12, 4), (5, 6), (2, 2), groups=2, offset_groups=6),
    'groups within offset groups': Case((12, 12), (5, 6), (2, 2), groups=6, offset_groups=2),
    'groups across offset groups': Case((12, 8), (5, 6), (2, 2), groups=4, offset_groups=3),
    'one image': Case((3, 4), (5, 6), (3, 2), batch=1),
    'no image': Case((6, 4), (5, 6), (3, 2), groups=2, offset_groups=3, batch=0),
    'prime batch': Case((3, 4), (5, 6), (3, 2), batch=7),
    '33 images': Case((2, 3), (4, 5), (3, 2), padding=(1, 0), batch=33),
    'several blocks of channels': Case((70, 3), (5, 6), (2, 1), groups=1, offset_groups=2),
    'many offset groups': Case((130, 3), (3, 4), (2, 1), offset_groups=65),
    'several tiles of positions': Case((3, 2), (33, 37), (2, 3), padding=(1, 1)),
}
# One CUDA kernel can compute their gradients of input, offset and mask. There is one for each number of lanes that
# share a sample, in half types and in float32, and there are some with taps for several thread blocks.
AT_ONCE = {
    '8 lanes': Case((32, 3), (9, 10), (3, 3), (1, 2), (1, 1), (2, 1), offset_groups=2),
    '8 lanes, two blocks of taps': Case((16, 2), (6, 11), (2, 8), padding=(1, 4), groups=2),
    '8 or 16 lanes': Case((40, 3), (5, 9), (3, 3), padding=(1, 1)),
    '16 lanes or a warp': Case((72, 2), (5, 4), (3, 3), padding=(1, 2), mask=False),
    'a warp': Case((128, 3), (4, 5), (3, 3), padding=(1, 1)),
    'groups, three blocks of taps': Case((96, 4), (6, 7), (5, 5), padding=(2, 1), groups=2, offset_groups=4),
}
COPIED_IN_PARTS = Case((70, 4), (340, 310), (2, 3), (37, 41), (1, 0), groups=2, offset_groups=5)


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of a larger tensor, in every dimension, from the second on."""
    larger = torch.full([2 * size + 2 for size in tensor.shape], torch.nan).to(tensor)
    view = larger[tuple(slice(2, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first slice of each dimension but the last two, repeated with stride 0."""
    return tensor[:1, :1].expand_as(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def some_channels(tensor: Tensor) -> Tensor:
    """Some channels of channels_last images with more."""
    batch, channels, height, width = tensor.shape
    larger = torch.full((batch, height, width, channels + 3), torch.nan).to(tensor)
    return larger.permute(0, 3, 1, 2)[:, 2 : channels + 2].copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    'contiguous': Tensor.contiguous,
    'channels last': lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    'some channels': some_channels,
    'sliced': sliced,
    'transposed': transposed,
    'batch inside': lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    'expanded': expanded,
}


def conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mask: Tensor | None,
) -> Tensor:
    """Convolve and ignore the offsets, with the arguments of deform_conv2d."""
    groups = input.shape[1] // weight.shape[1]
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups) + 0 * offset.sum()


def gradients(function: Callable[..., Tensor], call: Call, grad_output: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient, by name."""
    call = call.map(lambda tensor: tensor.detach().requires_grad_())
    output = call(function)
    grads = torch.autograd.grad(output, list(call.tensors().values()), grad_output)
    return {'output': output.detach(), **dict(zip(call.tensors(), grads, strict=True))}


def expected_gradients(call: Call, grad_output: Tensor) -> dict[str, Tensor]:
    """Return the results of the float64 reference."""
    return gradients(reference.deform_conv2d, call.map(Tensor.double), grad_output.double())


def draw_grad_output(call: Call, seed: int = 1) -> Tensor:
    shape = (len(call.input), len(call.weight), *call.offset.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(call.input)


def longest_sum(call: Call) -> int:
    """Count the terms of the longest sum in any result.

    An output adds up 4 corners of each tap and channel of a group, the gradient of the weight the
    positions of all images, that of an offset the channels.
    """
    positions = len(call.input) * call.offset.shape[2] * call.offset.shape[3]
    return 4 * max(call.weight[0].numel(), positions, call.weight[:, 0].numel())


def magnitudes(call: Call, grad_output: Tensor | None) -> dict[str, float]:
    """Bound, for each result, the sums of the absolute values of what its elements add up."""
    absolute = replace(call.map(torch.abs), offset=call.offset)
    if grad_output is None:
        return {'output': absolute.map(Tensor.double)(reference.deform_conv2d).abs().max().item()}
    results = expected_gradients(absolute, grad_output.abs())
    # An offset adds up the channels of its group; a column's gradient, times a slope between two pixels, a mask.
    weight = absolute.weight.double().unflatten(0, (call.groups, -1)).flatten(2)
    grad = grad_output.double().abs().flatten(2).unflatten(1, (call.groups, -1))
    columns = torch.einsum('gok,bgop->bgkp', weight, grad)
    factors = [columns, absolute.input, *([] if call.mask is None else [absolute.mask])]
    results['offset'] = 2 * call.input.shape[1] * math.prod(factor.double().max() for factor in factors)
    return {name: result.max().item() for name, result in results.items()}


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], call: Call, grad_output: Tensor | None = None
) -> None:
    """Compare the output of a call, and its gradients if that of the output is given.

    A sum of n terms rounds n times, each time by at most eps / 2 of a partial sum, which the sum of the absolute
    values bounds, and to the type of the result by half of its eps twice: the samples, where the processor multiplies
    in that type, and the result. On CUDA the gradient of the columns, from which those of offset and mask come, is
    rounded to the type of the input.
    """
    compute_eps = torch.finfo(torch.promote_types(call.input.dtype, torch.float32)).eps
    scale = magnitudes(call, grad_output) if len(call.input) else dict.fromkeys(actual, 0.0)
    for name, result in actual.items():
        of_columns = result.is_cuda and name in ('offset', 'mask')
        eps = longest_sum(call) * compute_eps / 2 + torch.finfo(call.input.dtype if of_columns else result.dtype).eps
        torch.testing.assert_close(
            result.double(),
            expected[name],
            rtol=0,
            atol=eps * scale[name],
            msg=lambda message, name=name: f'{name}: {message}',
        )


def check_against_reference(call: Call) -> None:
    grad_output = draw_grad_output(call)
    actual = gradients(deform_conv2d, call, grad_output)
    assert_close(actual, expected_gradients(call, grad_output), call, grad_output)


def assert_the_same_bits_with_any_number_of_threads(compute: Callable[[], dict[str, Tensor]]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = compute()
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for name, result in compute().items():
                assert torch.equal(result, expected[name]), f'{name} with {count} threads'
    finally:
        torch.set_num_threads(threads)


def each_subset(names: list[str]) -> Iterator[list[str]]:
    for bits in range(2 ** len(names)):
        yield [name for i, name in enumerate(names) if bits >> i & 1]


class Recorder(TorchDispatchMode):
    """Records the calls of mmdcn's operators: name, arguments, results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == 'mmdcn':
            self.calls.append((func._opname, args, result))
        return result
