# SPDX-License-Identifier: Apache-2.0
"""Where a detector's deformable layers look, in pixels of its input."""

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
    """The sampling of one call of a layer for one image; places are (y, x) in pixels of the network's input."""

    name: str  # a layer that is called again, as by the levels of a pyramid, has `#2` and so on after its name
    grid: Grid  # of the output's positions; its `layer` is the deformable layer before this one
    offset: Tensor  # [G, K, 2, H_out, W_out], (y, x) in pixels of the layer's input
    regular: Tensor  # [K, 2, H_out, W_out], the places of a convolution's taps
    places: Tensor  # [G, K, 2, H_out, W_out]
    masks: Tensor  # [G, K, H_out, W_out], or ones
    modulated: bool
    input_stride: tuple[float, float]  # (y, x): pixels of the network's input in one of the layer's input


class SamplingRecorder:
    """Record, while a model runs, where each deformable layer samples.

    Works for mmdcn's layers and for mmcv's, packed or not. A layer whose maps do not show the image, as those of
    regions, is left out. The place of a position follows from the operators before it (see
    `mmdcn.visualization.grids`); of a map that comes from elsewhere, from its size.

    Args:
        model: A network. It may take its images by position or by keyword, beside other things. The first image of a
            batch is recorded.

    Raises:
        ValueError: When the model is called without a tensor of images.

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
        self._calls: dict[nn.Module, int] = {}  # the index of a layer's last call
        self._resources = ExitStack()

    def __enter__(self) -> 'SamplingRecorder':
        with ExitStack() as stack:
            stack.enter_context(watched(self._model, self._record))
            stack.callback(self._model.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            # It is called after an error, too, so that none leaves the tracker behind.
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
        """Follow the taps of a layer, and theirs through the layers before it, back to the image.

        This is the figure of Dai et al., ICCV 2017, section 4.1: a tap of a layer is followed from the position that
        is nearest to it in the layer before. The weights are the products of the masks on the way.

        Args:
            name: The layer to start from.
            y: Place in pixels of the network's input.
            x: Likewise.
            depth: The number of layers to follow, at least 1; fewer are followed where the image is reached.
            group: The offset group; of layers with fewer groups, the last.
            regular: Follow the taps of plain convolutions instead, of weight 1.

        Returns:
            K ** depth places (y, x) in pixels of the network's input, and their weights.

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
        """Return a layer and those before it, on the way back to the image.

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
            ValueError: If there is none of this name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f'name must be one of {[layer.name for layer in self.layers]}, got {name!r}')

    def layer_for(self, size: float, depth: int = 1) -> SampledLayer:
        """Return the last layer of the stride that puts about eight positions across an object of this many pixels.

        Only layers with so many layers on the way back to the image are considered, if there are any.
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
        """Line up the edges of the image and of a map of unknown origin, unless it shows something else."""
        if len(map) != self._images:
            return None
        stride = tuple(a / b for a, b in zip(self.image_size, map.shape[-2:], strict=True))
        return Grid((stride[0], stride[1]), ((stride[0] - 1) / 2, (stride[1] - 1) / 2))


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # [B, C, H, W] or [C, H, W]
    """Return the images among what a module is called with: mmengine's models take them by keyword, or in lists."""
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.dim() in (3, 4):
            return value
    raise ValueError(
        'the model must be called with images, a tensor [B, C, H, W] or tensors [C, H, W], by position or by keyword, '
        f'got {[type(value).__name__ for value in (*args, *kwargs.values())]}'
    )
