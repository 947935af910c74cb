# SPDX-License-Identifier: Apache-2.0
"""Grids: the pixel of the image at which each position of a feature map lies.

Note: [Positions in the image]
The size of a map does not determine its stride: 48 rows at stride 32 give a map of 2 rows, as 24 rows do at stride 16.
So the grid of each tensor is computed from the operators that produced it. For a convolution or pooling with stride s,
padding p, dilation d and kernel size k, the centre of output position o is input position o * s - p + d * (k - 1) / 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mmdcn._private_hooks import TorchDispatchMode, tree_leaves

Pair = tuple[float, float]  # (y, x)


@dataclass(frozen=True)
class Grid:
    """The pixels of a map's positions: position (i, j) lies at pixel (start + i * stride, start + j * stride)."""

    stride: Pair = (1.0, 1.0)  # in pixels of the network's input
    start: Pair = (0.0, 0.0)
    layer: int | None = None  # the index of the last deformable layer that the map has passed through

    def places(self, positions: Tensor) -> Tensor:
        """Return the pixels [..., 2] of positions [..., 2], both (y, x), which may be fractional or outside the map."""
        return positions * positions.new_tensor(self.stride) + positions.new_tensor(self.start)

    def positions(self, places: Tensor) -> Tensor:
        """Return the positions [..., 2] of the map at pixels [..., 2]; the inverse of `places`."""
        return (places - places.new_tensor(self.start)) / places.new_tensor(self.stride)

    def then(self, scale: Sequence[float], shift: Sequence[float]) -> 'Grid':
        """Return the grid of a map whose position o lies at position o * scale + shift of this one."""
        y, x = ((s * a, b + s * c) for s, b, a, c in zip(self.stride, self.start, scale, shift, strict=True))
        return Grid((y[0], x[0]), (y[1], x[1]), self.layer)


def window_grid(grid: Grid, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Grid:
    """Return the grid of the output of a convolution or pooling; the settings are numbers or pairs (y, x)."""
    k, s, p, d = (_pair(value) for value in (kernel, stride, padding, dilation))
    return grid.then(s, [d[i] * (k[i] - 1) / 2 - p[i] for i in (0, 1)])


def _pair(value: Any) -> Pair:
    values = [value] if isinstance(value, int | float) else list(value)
    return (values[0], values[-1])


def _convolution(grid: Grid, output: Tensor, input: Tensor, weight: Tensor, bias: Any, *settings: Any) -> Grid:
    stride, padding, dilation, transposed = settings[:4]
    forward = window_grid(Grid(), weight.shape[2:], stride, padding, dilation)
    if not transposed:
        return grid.then(forward.stride, forward.start)
    return grid.then(
        [1 / s for s in forward.stride], [-b / s for s, b in zip(forward.stride, forward.start, strict=True)]
    )


def _pool(
    grid: Grid, output: Tensor, input: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    *_: Any,
) -> Grid:  # fmt: skip
    return window_grid(grid, kernel, stride or kernel, padding, dilation)


def _average_pool(
    grid: Grid, output: Tensor, input: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, *_: Any
) -> Grid:
    return window_grid(grid, kernel, stride or kernel, padding, 1)


def _resize(grid: Grid, output: Tensor, input: Tensor, *_: Any) -> Grid:
    """Align the outer edges of both maps."""
    scale = [a / b for a, b in zip(input.shape[-2:], output.shape[-2:], strict=True)]
    return grid.then(scale, [(s - 1) / 2 for s in scale])


def _resize_smoothly(grid: Grid, output: Tensor, input: Tensor, size: Any, align_corners: bool, *_: Any) -> Grid:
    if not align_corners:
        return _resize(grid, output, input)
    scale = [(a - 1) / max(b - 1, 1) for a, b in zip(input.shape[-2:], output.shape[-2:], strict=True)]
    return grid.then(scale, (0, 0))


def _pad(grid: Grid, output: Tensor, input: Tensor, padding: Sequence[int], *_: Any) -> Grid:
    left, top = padding[0], padding[2] if len(padding) > 2 else 0
    return grid.then((1, 1), (-top, -left))


def _slice(
    grid: Grid, output: Tensor, input: Tensor, dim: int = 0, start: int | None = None, end: Any = None, step: int = 1
) -> Grid:
    axis = dim % input.dim() - (input.dim() - 2)
    if axis < 0:
        return grid
    first = start or 0
    first = min(max(first + input.shape[dim], 0) if first < 0 else first, input.shape[dim])
    scale, shift = [1, 1], [0, 0]
    scale[axis], shift[axis] = step, first
    return grid.then(scale, shift)


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Grid]] = {
    _aten.convolution: _convolution,
    _aten.max_pool2d_with_indices: _pool,
    _aten.avg_pool2d: _average_pool,
    _aten.upsample_nearest2d: _resize,
    _aten.upsample_bilinear2d: _resize_smoothly,
    _aten.upsample_bicubic2d: _resize_smoothly,
    _aten.constant_pad_nd: _pad,
    _aten.slice: _slice,
}
_Key = tuple[StorageWeakRef, int, torch.Size]


class GridTracker(TorchDispatchMode):
    """Record, as a context manager, the grid of every tensor that is computed from an image.

    The output of an operator without a rule above gets the grid of the first argument that has a grid and the same
    height and width; this is right for additions and normalizations. A tensor without a grid, such as the features of
    a region, is not recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._grids: dict[_Key, Grid] = {}

    def note(self, tensor: Tensor, grid: Grid) -> None:
        """Set the grid of a tensor [..., H, W]."""
        self._grids[_key(tensor)] = grid

    def grid_of(self, tensor: Tensor) -> Grid | None:
        """Return the grid of a tensor, or None if it is not known."""
        return self._grids.get(_key(tensor)) if tensor.dim() >= 2 else None

    def forget(self) -> None:
        """Forget all grids."""
        self._grids.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and record the grids of its outputs."""
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        grids = [(value.shape[-2:], grid) for value in inputs if (grid := self.grid_of(value))]
        result = func(*args, **(kwargs or {}))
        if grids:
            rule = _RULES.get(func.overloadpacket)
            for output in tree_leaves(result):
                if not isinstance(output, Tensor) or output.dim() < 2:
                    continue
                if rule is not None:
                    self.note(output, rule(grids[0][1], output, *args, **(kwargs or {})))
                elif same := [grid for shape, grid in grids if shape == output.shape[-2:]]:
                    self.note(output, same[0])
        return result


def _key(tensor: Tensor) -> _Key:
    # Autograd may replace a view by another tensor on the same memory, so a tensor itself is not a reliable key.
    return StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset()), tensor.shape[-2:]
