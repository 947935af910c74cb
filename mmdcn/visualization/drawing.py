# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a SamplingRecorder has recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mmdcn.visualization.sampling_points import SampledLayer, SamplingRecorder

# Behind the text, so that it can be read on any ground.
_LABEL = dict(facecolor='black', alpha=0.6, lw=0, pad=0.8)


@dataclass(frozen=True)
class Picture:
    """An image, and how it became the network's input.

    Pixel (y, x) of the network's input lies on (y + 0.5) / scale - 0.5 of the image, the same for x.
    """

    pixels: np.ndarray[Any, Any]  # [H, W, 3], RGB, uint8
    scale: tuple[float, float] = (1.0, 1.0)  # (y, x)

    def from_input(self, places: Tensor) -> Tensor:  # [..., 2] -> [..., 2]
        """Return the places (y, x) in the image of places in the network's input."""
        return (places + 0.5) / places.new_tensor(self.scale) - 0.5

    def to_input(self, y: float, x: float) -> tuple[float, float]:
        """Return the place in the network's input of a place in the image."""
        return (y + 0.5) * self.scale[0] - 0.5, (x + 0.5) * self.scale[1] - 0.5

    def show(self, ax: Axes) -> None:
        """Draw the image, and keep the axes at its edges whatever is drawn over it."""
        ax.imshow(self.pixels)
        ax.set(xlim=(-0.5, self.pixels.shape[1] - 0.5), ylim=(self.pixels.shape[0] - 0.5, -0.5))
        ax.set_axis_off()


@dataclass(frozen=True)
class Detection:
    """A box of a detector, in pixels of the image."""

    left: float
    top: float
    right: float
    bottom: float
    label: str
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (y, x)."""
        return (self.top + self.bottom) / 2, (self.left + self.right) / 2

    @property
    def size(self) -> float:
        """The longer side."""
        return max(self.right - self.left, self.bottom - self.top)

    def draw(self, ax: Axes) -> None:
        """Draw the box with its label and score."""
        width, height = self.right - self.left, self.bottom - self.top
        ax.add_patch(Rectangle((self.left, self.top), width, height, fill=False, color='lime', lw=1.2))
        text = f'{self.label} {self.score:.2f}'
        at_edge = self.top < 0.06 * max(ax.get_ylim())
        y, above = (max(self.top, 0) + 2, 'top') if at_edge else (self.top - 1, 'bottom')
        ax.text(self.left, y, text, color='lime', fontsize=7, va=above, bbox=_LABEL, clip_on=True)


def new_figure(
    rows: int, columns: int, pixels: np.ndarray[Any, Any], width: float = 3.4, beside: float = 0.0
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Make a figure of images that are so many inches wide, with room beside each, and its axes [rows, columns].

    It is not among pyplot's, and needs no display.
    """
    height = width * pixels.shape[0] / pixels.shape[1]
    figure = Figure(figsize=((width + beside) * columns, (height + 0.2) * rows + 0.3), layout='compressed', dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def pixels_of(figure: Figure) -> np.ndarray[Any, Any]:  # [H, W, 3], RGB, uint8
    """Draw a figure."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_points(
    ax: Axes, picture: Picture, places: Tensor, weights: Tensor, centre: tuple[float, float], size: float = 12
) -> None:
    """Draw sampling points [N, 2] of the network's input, heavier ones darker, around a place (y, x) of the image."""
    at = picture.from_input(places)
    shade: Any = (weights / weights.max().clamp(min=1e-12)).clamp(min=0.2).numpy()
    ax.scatter(at[:, 1], at[:, 0], s=size, c='red', edgecolors='white', alpha=shade, lw=0.02 * size)
    ax.plot(centre[1], centre[0], '+', color='cyan', ms=8, mew=1.5)


def draw_detections(
    ax: Axes, picture: Picture, recorder: SamplingRecorder, detections: Sequence[Detection], depth: int
) -> None:
    """Draw the boxes, and for each the sampling points of its centre in the layer that suits its size."""
    picture.show(ax)
    for detection in detections:
        detection.draw(ax)
        if recorder.layers:
            layer = recorder.layer_for(detection.size * picture.scale[0])
            y, x = picture.to_input(*detection.centre)
            draw_points(ax, picture, *recorder.points(layer.name, y, x, depth), detection.centre)


def points_figure(
    picture: Picture,
    recorder: SamplingRecorder,
    layer: str,
    locations: Sequence[tuple[float, float]],
    depth: int = 3,
) -> Figure:
    """Draw the points that one, two, three, ... stacked layers sample (figure 6 of Dai et al., ICCV 2017).

    Args:
        picture: The image.
        recorder: Has run the network on it.
        layer: The name of the last of the layers.
        locations: Places (y, x) in pixels of the image, one for each row.
        depth: The most layers to follow, at least 1; the columns follow 1 layer, 2, and so on.
    """
    depths = range(1, min(depth, len(recorder.stack(layer))) + 1)
    figure, axes = new_figure(len(locations), len(depths), picture.pixels)
    for row, location in zip(axes, locations, strict=True):
        for ax, followed in zip(row, depths, strict=True):
            places, weights = recorder.points(layer, *picture.to_input(*location), followed)
            picture.show(ax)
            draw_points(ax, picture, places, weights, location, size=32 / followed**1.5)
            ax.set_title(f'{len(places)} points', fontsize=9)
    figure.suptitle(f'Sampling points of {layer} and the layers before it, for the place +', fontsize=10)
    return figure


def magnitude_map(layer: SampledLayer) -> Tensor:  # [H_out, W_out]
    """Return the mean length of the offsets of all groups and taps, in pixels of the network's input."""
    stride = layer.offset.new_tensor(layer.input_stride)[:, None, None]
    return (layer.offset * stride).square().sum(2).sqrt().mean((0, 1))


def maps_figure(picture: Picture, recorder: SamplingRecorder) -> Figure:
    """Draw for each layer the mean length of its offsets, and for a modulated one the mean of its masks."""
    columns = 1 + any(layer.modulated for layer in recorder.layers)
    figure, axes = new_figure(len(recorder.layers), columns, picture.pixels, width=2.7, beside=0.5)
    for row, layer in zip(axes, recorder.layers, strict=True):
        _draw_map(row[0], picture, layer, magnitude_map(layer), 'offsets, mean length (px)')
        if layer.modulated:
            _draw_map(row[1], picture, layer, layer.masks.mean((0, 1)), 'masks, mean')
        for ax in row[1 + layer.modulated :]:
            ax.set_axis_off()
    return figure


def _draw_map(ax: Axes, picture: Picture, layer: SampledLayer, values: Tensor, label: str) -> None:
    """Draw a map where its positions lie, each as large as its stride."""
    picture.show(ax)
    height, width = values.shape
    corners = torch.tensor([[-0.5, -0.5], [height - 0.5, width - 0.5]])
    (top, left), (bottom, right) = picture.from_input(layer.grid.places(corners)).tolist()
    image = ax.imshow(values, extent=(left, right, bottom, top), cmap='viridis', alpha=0.75, interpolation='nearest')
    picture_height, picture_width = picture.pixels.shape[:2]
    ax.set(xlim=(-0.5, picture_width - 0.5), ylim=(picture_height - 0.5, -0.5))
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02).ax.tick_params(labelsize=7)
    ax.set_title(f'{layer.name}: {label}', fontsize=7, loc='left')


def field_figure(
    picture: Picture, fields: Sequence[Tensor], locations: Sequence[tuple[float, float]], layer: str
) -> Figure:
    """Draw effective receptive fields.

    Args:
        picture: The image.
        fields: For each place the field [H, W] of the network's input, as of `effective_receptive_field`.
        locations: Their places (y, x) in pixels of the image.
        layer: The name of their layer.
    """
    columns = min(4, len(locations))
    figure, axes = new_figure(-(-len(locations) // columns), columns, picture.pixels)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, field, location in zip(axes.flat, fields, locations, strict=False):
        picture.show(ax)
        (top, left), (bottom, right) = picture.from_input(
            torch.tensor([[-0.5, -0.5], [field.shape[0] - 0.5, field.shape[1] - 0.5]])
        ).tolist()
        strength = (field / field.max().clamp(min=1e-30)).sqrt()  # the root shows the faint rim too
        ax.imshow(strength, extent=(left, right, bottom, top), cmap='inferno', alpha=0.25 + 0.75 * strength)
        ax.plot(location[1], location[0], '+', color='cyan', ms=8, mew=1.5)
        share = (field > 0.0455 * field.max()).double().mean()  # as Luo et al. count: within two deviations
        ax.set_title(f'{share:.1%} of the image', fontsize=9)
        ax.set(xlim=(-0.5, picture.pixels.shape[1] - 0.5), ylim=(picture.pixels.shape[0] - 0.5, -0.5))
    figure.suptitle(f'Effective receptive field of {layer} at the place +', fontsize=10)
    return figure
