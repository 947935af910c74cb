# SPDX-License-Identifier: Apache-2.0
"""Figures of the sampling locations that a `SamplingRecorder` has recorded."""

import textwrap
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

# A dark box behind the text keeps it readable on any background.
_LABEL = dict(facecolor='black', alpha=0.6, lw=0, pad=0.8)


@dataclass(frozen=True)
class Picture:
    """An image, and the scale at which the network takes it.

    Coordinate y of the network's input corresponds to (y + 0.5) / scale - 0.5 in the image, and likewise for x.
    """

    pixels: np.ndarray[Any, Any]  # [H, W, 3], RGB, uint8
    scale: tuple[float, float] = (1.0, 1.0)  # (y, x)

    def from_input(self, places: Tensor) -> Tensor:  # [..., 2] -> [..., 2]
        """Convert locations (y, x) from pixels of the network's input to pixels of the image."""
        return (places + 0.5) / places.new_tensor(self.scale) - 0.5

    def to_input(self, y: float, x: float) -> tuple[float, float]:
        """Convert a location from pixels of the image to pixels of the network's input."""
        return (y + 0.5) * self.scale[0] - 0.5, (x + 0.5) * self.scale[1] - 0.5

    def show(self, ax: Axes) -> None:
        """Draw the image, and limit the axes to its edges."""
        ax.imshow(self.pixels)
        ax.set(xlim=(-0.5, self.pixels.shape[1] - 0.5), ylim=(self.pixels.shape[0] - 0.5, -0.5))
        ax.set_axis_off()


@dataclass(frozen=True)
class Detection:
    """A detected box, in pixels of the image."""

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
        """The length of the longer side."""
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
    rows: int,
    columns: int,
    pixels: np.ndarray[Any, Any],
    title: str = '',
    width: float = 3.4,
    beside: float = 0.0,
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Make a figure of images and its axes [rows, columns]; `width` and the room `beside` each image are in inches.

    The title is wrapped to the figure's width. The figure is not registered in pyplot and needs no display.
    """
    total = (width + beside) * columns
    lines = textwrap.wrap(title, int(13 * total))  # about 13 characters per inch at the title's size
    height = (width * pixels.shape[0] / pixels.shape[1] + 0.2) * rows + 0.3 + 0.17 * len(lines[1:])
    figure = Figure(figsize=(total, height), layout='compressed', dpi=110)
    FigureCanvasAgg(figure)
    if lines:
        figure.suptitle('\n'.join(lines), fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def pixels_of(figure: Figure) -> np.ndarray[Any, Any]:  # [H, W, 3], RGB, uint8
    """Render a figure to an array."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_points(
    ax: Axes, picture: Picture, places: Tensor, weights: Tensor, centre: tuple[float, float], size: float = 12
) -> None:
    """Draw sampling points, opaque where their weight is large, and the location that they belong to.

    Args:
        ax: The axes that show the picture.
        picture: The image.
        places: The points (y, x) in pixels of the network's input, [N, 2].
        weights: Their weights, [N].
        centre: The location (y, x) in pixels of the image.
        size: The area of a point, as in `Axes.scatter`.
    """
    at = picture.from_input(places)
    shade: Any = (weights / weights.max().clamp(min=1e-12)).clamp(min=0.2).numpy()
    ax.scatter(at[:, 1], at[:, 0], s=size, c='red', edgecolors='white', alpha=shade, lw=0.02 * size)
    ax.plot(centre[1], centre[0], '+', color='cyan', ms=8, mew=1.5)


def draw_detections(
    ax: Axes, picture: Picture, recorder: SamplingRecorder, detections: Sequence[Detection], depth: int
) -> None:
    """Draw each box, and the sampling points for its centre in the layer that suits the size of the box.

    The box with the highest score lies on top.
    """
    picture.show(ax)
    for detection in sorted(detections, key=lambda detection: detection.score):
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
        recorder: The recorder of a run of the network on this image.
        layer: The name of the last of the stacked layers.
        locations: Locations (y, x) in pixels of the image, one per row.
        depth: The maximum number of layers to follow, at least 1; the columns follow 1 layer, 2 layers, and so on.
    """
    depths = range(1, min(depth, len(recorder.stack(layer))) + 1)
    title = f'Sampling points of {layer} and the layers before it, for the location +'
    figure, axes = new_figure(len(locations), len(depths), picture.pixels, title)
    for row, location in zip(axes, locations, strict=True):
        for ax, followed in zip(row, depths, strict=True):
            places, weights = recorder.points(layer, *picture.to_input(*location), followed)
            picture.show(ax)
            draw_points(ax, picture, places, weights, location, size=32 / followed**1.5)
            ax.set_title(f'{len(places)} points', fontsize=9)
    return figure


def magnitude_map(layer: SampledLayer) -> Tensor:  # [H_out, W_out]
    """Return the mean length of the offsets of all groups and taps, in pixels of the network's input."""
    stride = layer.offset.new_tensor(layer.input_stride)[:, None, None]
    return (layer.offset * stride).square().sum(2).sqrt().mean((0, 1))


def maps_figure(picture: Picture, recorder: SamplingRecorder) -> Figure:
    """Draw the mean offset length of each layer, and the mean mask of each modulated layer."""
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
    """Draw a map over the image: each position is a rectangle of the size of its stride."""
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
    """Draw the effective receptive fields of a layer at several locations.

    Args:
        picture: The image.
        fields: The field [H, W] over the network's input for each location, as `effective_receptive_field` returns it.
        locations: The locations (y, x) in pixels of the image.
        layer: The name of the layer.
    """
    columns = min(4, len(locations))
    title = f'Effective receptive field of {layer} at the location +'
    figure, axes = new_figure(-(-len(locations) // columns), columns, picture.pixels, title)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, field, location in zip(axes.flat, fields, locations, strict=False):
        picture.show(ax)
        (top, left), (bottom, right) = picture.from_input(
            torch.tensor([[-0.5, -0.5], [field.shape[0] - 0.5, field.shape[1] - 0.5]])
        ).tolist()
        strength = (field / field.max().clamp(min=1e-30)).sqrt()  # the square root makes the faint rim visible
        ax.imshow(strength, extent=(left, right, bottom, top), cmap='inferno', alpha=0.25 + 0.75 * strength)
        ax.plot(location[1], location[0], '+', color='cyan', ms=8, mew=1.5)
        share = (field > 0.0455 * field.max()).double().mean()  # Luo et al.'s threshold: two standard deviations
        ax.set_title(f'{share:.1%} of the image', fontsize=9)
        ax.set(xlim=(-0.5, picture.pixels.shape[1] - 0.5), ylim=(picture.pixels.shape[0] - 0.5, -0.5))
    return figure
