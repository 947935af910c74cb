# SPDX-License-Identifier: Apache-2.0
"""The calls of deform_roi_pool that its tests share, and how they are compared.

Note: [Places off the grid]
A region begins at a multiple of 1/2 pixel of the input, and is an odd number of 32ths long; an offset is an odd number
of eighths. So the place of a sample is an odd number over an even one, and not a whole pixel, where a derivative jumps,
as long as a bin has fewer than 16 samples along an axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from mmdcn import reference

Pair = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """The arguments of deform_roi_pool."""

    input: Tensor
    rois: Tensor
    offset: Tensor | None
    output_size: Pair
    spatial_scale: float
    sampling_ratio: int
    gamma: float
    aligned: bool = True

    def __call__(self, function: Callable[..., Tensor]) -> Tensor:
        return function(**{field.name: getattr(self, field.name) for field in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that have gradients, by name."""
        return {'input': self.input} | ({} if self.offset is None else {'offset': self.offset})

    def map(self, change: Callable[[Tensor], Tensor]) -> 'Call':
        return replace(self, rois=change(self.rois), **{name: change(value) for name, value in self.tensors().items()})


@dataclass(frozen=True)
class Case:
    """The sizes of a call; no two sizes agree that need not."""

    channels: int = 3
    size: Pair = (9, 12)
    rois: int = 5
    bins: Pair = (2, 3)
    spatial_scale: float = 0.5
    sampling_ratio: int = 0
    gamma: float = 0.25
    batch: int = 2
    offset: bool = True
    reach: float = 1.0  # of the regions: 1 for as large as the image
    aligned: bool = True

    def draw(self, dtype: torch.dtype = torch.float64, device: str | torch.device = 'cpu', seed: int = 0) -> Call:
        """Draw a call; bfloat16 has too few digits for its places, which are in float32 then."""
        generator = torch.Generator().manual_seed(seed)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator).double()

        height, width = (int(self.reach * size / self.spatial_scale) for size in self.size)
        images = whole(0, max(self.batch, 1), self.rois, 1)
        corner = torch.cat([whole(-4, width, self.rois, 1), whole(-4, height, self.rois, 1)], 1)
        extent = torch.cat([whole(1, width, self.rois, 1), whole(1, height, self.rois, 1)], 1)
        ends = corner + extent / 2 + 0.3125
        call = Call(
            input=torch.randn(self.batch, self.channels, *self.size, generator=generator, dtype=torch.float64),
            rois=torch.cat([images, corner, ends], 1)[: self.rois if self.batch else 0],
            offset=None,
            output_size=self.bins,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
            aligned=self.aligned,
        )
        if self.offset:
            call = replace(call, offset=(2 * whole(-5, 5, len(call.rois), 2, *self.bins) + 1) / 8)
        places = torch.float32 if dtype == torch.bfloat16 else dtype
        call = call.map(lambda tensor: tensor.to(device, places))
        return replace(call, input=call.input.to(dtype))


CASES = {
    'defaults': Case(),
    'no offsets': Case(offset=False),
    'not aligned': Case(aligned=False),
    'not aligned, less than a pixel': Case(aligned=False, reach=0.1, bins=(1, 3), spatial_scale=0.25),
    'two samples': Case(sampling_ratio=2),
    'many samples': Case(sampling_ratio=7, size=(5, 4)),
    'one bin': Case(bins=(1, 1)),
    'more bins than pixels': Case(bins=(5, 7), size=(3, 4)),
    'far beyond the image': Case(reach=3, rois=9),
    'one pixel': Case(size=(1, 1), reach=4),
    'one row': Case(size=(1, 7), reach=2, bins=(3, 2)),
    'enlarged': Case(spatial_scale=2.0, channels=2),
    'no region': Case(rois=0),
    'no image': Case(batch=0),
    'many images': Case(batch=7, rois=11),
    'several blocks of channels': Case(channels=70),
    'vectors of channels': Case(channels=48, size=(6, 5), bins=(3, 2)),
    'one bin of vectors': Case(channels=48, size=(6, 5), bins=(1, 1)),
    'many bins': Case(size=(8, 9), rois=4, bins=(9, 14)),
}
# More pixels and weights than fit into a GPU's shared memory; more regions than a thread block looks at together.
LARGE = {
    'large regions': Case(channels=1, size=(95, 96), rois=4, bins=(7, 7), batch=1),
    'many regions': Case(channels=2, size=(4, 5), rois=300, bins=(1, 2)),
}
each_dtype = pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def between_vectors(tensor: Tensor) -> Tensor:
    """Return a copy of the tensor in memory that begins one element past a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:]
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def gradients(function: Callable[..., Tensor], call: Call, grad_output: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors().items()}
    output = replace(call, **leaves)(function)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {'output': output.detach(), **dict(zip(leaves, grads, strict=True))}


def expected_gradients(call: Call, grad_output: Tensor) -> dict[str, Tensor]:
    """Return the results of the float64 reference."""
    return gradients(reference.deform_roi_pool, call.map(Tensor.double), grad_output.double())


def draw_grad_output(call: Call, seed: int = 1) -> Tensor:
    shape = (len(call.rois), call.input.shape[1], *call.output_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(call.input)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], call: Call, grad_output: Tensor | None = None
) -> None:
    """Compare the output of a call, and its gradients if that of the output is given.

    A sum of n terms rounds n times, each time by at most eps / 2 of the sum of the absolute values; a result is rounded
    to its type once more. A weight is a sum of differences between a pixel and a sample, whose place is known to eps
    times the largest place, and so are the sums of weights.
    """
    if not len(call.rois):
        for name, result in actual.items():
            torch.testing.assert_close(result.double(), expected[name])
        return
    compute_eps = torch.finfo(torch.promote_types(call.input.dtype, torch.float32)).eps
    extents = (call.rois[:, 1:] * call.spatial_scale).abs().amax().item()
    place = extents * (1 + (0 if call.offset is None else 2 * call.gamma * call.offset.abs().amax().item()))
    pixel = call.input.abs().amax().item()
    scale = {'output': pixel}
    if grad_output is not None:
        scale['input'] = expected_gradients(call, grad_output.abs())['input'].abs().amax().item()
        # A slope is the difference of two pixels, for each channel.
        grads = grad_output.double().abs().sum(1).amax().item()
        scale['offset'] = 2 * grads * pixel * 2 * call.gamma * extents
    terms = max(call.input[0].numel(), grad_output.numel() if grad_output is not None else 0)
    for name, result in actual.items():
        relative = (terms / 2 + 4 * place) * compute_eps + torch.finfo(result.dtype).eps
        torch.testing.assert_close(
            result.double(),
            expected[name].double(),
            rtol=0,
            atol=relative * scale[name],
            msg=lambda message, name=name: f'{name}: {message}',
        )
