# SPDX-License-Identifier: Apache-2.0
"""Where a network's deformable layers sample, in pixels of its input."""

from contextlib import ExitStack
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from mmdcn._private_hooks import tree_leaves
from mmdcn.visualization.grids import Grid, GridTracker, window_grid
from mmdcn.visualization.sampling import Sampling, watched


@dataclass
class SampledLayer:
    """The sampling of one call of a layer for one image; locations are (y, x) in pixels of the network's input."""

    name: str  # later calls of a layer, such as for the levels of a pyramid, have `#2`, `#3`, ... after the name
    grid: Grid  # the grid of the output; its `layer` is the index of the deformable layer before this one
    offset: Tensor  # [G, K, 2, H_out, W_out], (y, x) in pixels of the layer's input
    regular: Tensor  # [K, 2, H_out, W_out], the locations of the taps without offsets
    places: Tensor  # [G, K, 2, H_out, W_out], the sampling locations
    masks: Tensor  # [G, K, H_out, W_out]; ones for a layer without masks
    modulated: bool
    input_stride: tuple[float, float]  # (y, x): pixels of the network's input per pixel of the layer's input


class SamplingRecorder:
    """Record where each deformable layer samples while a model runs.

    This works for the layers of mmdcn and mmcv, packed or not. A layer whose maps do not cover the whole image, such as
    a layer on the features of regions, is left out. The location of a position follows from the operators before it
    (see `mmdcn.visualization.grids`), or from the size of the map if these are unknown.

    Args:
        model: A network. It may take its images by position or by keyword, among other arguments. Only the first image
            of a batch is recorded.

    Raises:
        ValueError: If the model is called without a tensor of images.

    Example:
        with SamplingRecorder(model) as recorder:
            model(images)
        points = recorder.points(recorder.layers[-1].name, y=80.0, x=40.0)
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[SampledLayer] = []
        self.image_size = (0, 0)  # (H, W) of the network's input
        self._images = 0
        self._model = model
        self._tracker = GridTracker()
        self._tracking = ExitStack()
        self._calls: dict[nn.Module, int] = {}  # index in `layers` of each layer's last call
        self._resources = ExitStack()

    def __enter__(self) -> 'SamplingRecorder':
        with ExitStack() as stack:
            stack.enter_context(watched(self._model, self._record))
            stack.callback(self._model.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            # always_call: the tracker must also be removed after an error.
            stack.callback(self._model.register_forward_hook(self._stop, always_call=True).remove)
            for layer in self._model.modules():
                if hasattr(layer, 'deform_groups'):
                    stack.callback(layer.register_forward_hook(self._finish).remove)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def points(
        self, name: str, y: float, x: float, depth: int = 2, group: int = 0, regular: bool = False
    ) -> tuple[Tensor, Tensor]:  # [N, 2], [N]
        """Follow the taps of a layer back through the layers before it to the image.

        These are the points that Dai et al., ICCV 2017, section 4.1, draw: each tap of a layer continues at the nearest
        position of the layer before. The weight of a point is the product of the masks on its path.

        Args:
            name: The layer to start from.
            y: The y coordinate of a location, in pixels of the network's input.
            x: The x coordinate.
            depth: The number of layers to follow, at least 1; fewer if the image is reached before.
            group: The offset group. A layer with fewer groups uses its last one.
            regular: Follow the taps of plain convolutions instead, with weight 1.

        Returns:
            K ** depth locations (y, x) in pixels of the network's input, and their weights.

        Raises:
            ValueError: If no layer has this name.
        """
        places, weights = torch.tensor([[float(y), float(x)]]), torch.ones(1)
        for layer in self.stack(name)[:depth]:
            size = torch.tensor(layer.places.shape[-2:])
            index = layer.grid.positions(places).round().long().clamp(min=torch.zeros(2).long(), max=size - 1)
            own = min(group, len(layer.places) - 1)
            taps = layer.regular if regular else layer.places[own]
            masks = torch.ones_like(layer.masks[own]) if regular else layer.masks[own]
            places = taps[:, :, index[:, 0], index[:, 1]].permute(2, 0, 1).flatten(0, 1)
            weights = (masks[:, index[:, 0], index[:, 1]].T * weights[:, None]).flatten()
        return places, weights

    def stack(self, name: str) -> list[SampledLayer]:
        """Return a layer and the deformable layers before it, in order back to the image.

        Raises:
            ValueError: If no layer has this name.
        """
        layers = [self.layer(name)]
        while (before := layers[-1].grid.layer) is not None:
            layers.append(self.layers[before])
        return layers

    def layer(self, name: str) -> SampledLayer:
        """Return a layer by its name.

        Raises:
            ValueError: If no layer has this name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f'name must be one of {[layer.name for layer in self.layers]}, got {name!r}')

    def layer_for(self, size: float, depth: int = 1) -> SampledLayer:
        """Return the layer that suits an object: the last one whose stride puts about eight positions across it.

        Args:
            size: The size of the object in pixels of the network's input.
            depth: The number of deformable layers that should lie on the way back to the image, the layer included. If
                no layer has so many, all are considered.
        """
        deep = [layer for layer in self.layers if len(self.stack(layer.name)) >= depth]
        return min(reversed(deep or self.layers), key=lambda layer: abs(log2(8 * layer.grid.stride[0] / max(size, 1))))

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = _images(args, kwargs)
        self.layers.clear()
        self.image_size = (images.shape[-2], images.shape[-1])
        self._images = len(images) if images.dim() == 4 else 1
        self._tracker.note(images, Grid())
        self._tracking.enter_context(self._tracker)

    def _stop(self, *_: Any) -> None:
        self._tracking.close()
        self._tracker.forget()
        self._calls.clear()

    def _record(self, layer: nn.Module, sampling: Sampling) -> None:
        input_grid = self._tracker.grid_of(sampling.input) or self._grid_by_size(sampling.input)
        if input_grid is None:
            return
        settings: Any = layer
        grid = window_grid(input_grid, settings.kernel_size, settings.stride, settings.padding, settings.dilation)
        places = input_grid.places((sampling.regular + sampling.offset[0]).movedim(-3, -1)).movedim(-1, -3)
        regular = input_grid.places(sampling.regular.movedim(-3, -1)).movedim(-1, -3)
        masks = torch.ones_like(places[:, :, 0]) if sampling.mask is None else sampling.mask[0]
        names = [known.name.partition('#')[0] for known in self.layers]
        again = f'#{names.count(sampling.name) + 1}' if sampling.name in names else ''
        self._calls[layer] = len(self.layers)
        self.layers.append(
            SampledLayer(
                sampling.name + again,
                grid,
                sampling.offset[0].cpu(),
                regular.cpu(),
                places.cpu(),
                masks.cpu(),
                sampling.mask is not None,
                input_grid.stride,
            )
        )

    def _finish(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if layer in self._calls:
            index = self._calls[layer]
            grid = self.layers[index].grid
            self._tracker.note(output, Grid(grid.stride, grid.start, index))

    def _grid_by_size(self, map: Tensor) -> Grid | None:
        """Align a map of unknown origin with the edges of the image; None if its batch is not that of the images."""
        if len(map) != self._images:
            return None
        stride = tuple(a / b for a, b in zip(self.image_size, map.shape[-2:], strict=True))
        return Grid((stride[0], stride[1]), ((stride[0] - 1) / 2, (stride[1] - 1) / 2))


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # [B, C, H, W] or [C, H, W]
    """Return the first argument that can be images; mmengine's models take them by keyword or in lists."""
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.dim() in (3, 4):
            return value
    raise ValueError(
        'the model must be called with images, a tensor [B, C, H, W] or tensors [C, H, W], by position or by keyword, '
        f'got {[type(value).__name__ for value in (*args, *kwargs.values())]}'
    )
