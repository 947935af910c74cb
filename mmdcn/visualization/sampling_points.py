# SPDX-License-Identifier: Apache-2.0
"""Where a detector's deformable layers look, in pixels of its input."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdcn._private_hooks import tree_leaves
from mmdcn.reference.deform_conv2d import regular_places


@dataclass
class SampledLayer:
    """The sampling of one layer for one image.

    Note: [Places in the image]
    In a ResNet each convolution or pooling of stride s and padding (k - 1) / 2 puts its output position i on pixel
    i * s of its input. So position i of a feature map of total stride S lies on pixel i * S of the image.
    """

    name: str
    stride: int  # of the output, in pixels of the network's input
    places: Tensor  # [K, 2, H_out, W_out], (y, x) in pixels of the network's input
    weights: Tensor  # [K, H_out, W_out], the mask, or ones


class SamplingRecorder:
    """Record, while a model runs, where each packed deformable layer samples.

    Works for mmdcn's layers and for mmcv's. With several offset groups, the first is taken.

    Args:
        model: A network whose deformable layers have a `conv_offset`. It may take its images by position or by keyword,
            beside other things. The first image of a batch is recorded.

    Raises:
        ValueError: When the model is called without a tensor of images.

    Example:
        with SamplingRecorder(model) as recorder:
            model(images)
        points = recorder.points(recorder.layers[-1].name, y=80.0, x=40.0)
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[SampledLayer] = []
        self._input_height = 0
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> 'SamplingRecorder':
        self._handles = [self._model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for name, layer in self._model.named_modules():
            if hasattr(layer, 'conv_offset') and hasattr(layer, 'deform_groups'):
                hook = self._hook(name, layer)
                self._handles.append(layer.conv_offset.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def points(self, name: str, y: float, x: float, depth: int = 2) -> tuple[Tensor, Tensor]:  # [N, 2], [N]
        """Follow the taps of a layer, and theirs through the layers before it, back to the image.

        This is the figure of Dai et al., ICCV 2017, section 4.1: a tap of a layer is followed from the position that
        is nearest to it in the layer before. The weights are the products of the masks on the way.

        Args:
            name: The layer to start from.
            y: Place in pixels of the network's input.
            x: Likewise.
            depth: The number of layers to follow, at least 1.

        Returns:
            K ** depth places (y, x) in pixels of the network's input, and their weights.
        """
        last = [layer.name for layer in self.layers].index(name)
        places, weights = torch.tensor([[y, x]]), torch.ones(1)
        for layer in reversed(self.layers[max(0, last - depth + 1) : last + 1]):
            size = torch.tensor(layer.places.shape[2:])
            index = (places / layer.stride).round().long().clamp(min=torch.zeros(2).long(), max=size - 1)
            places = layer.places[:, :, index[:, 0], index[:, 1]].permute(2, 0, 1).flatten(0, 1)
            weights = (layer.weights[:, index[:, 0], index[:, 1]].T * weights[:, None]).flatten()
        return places, weights

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layers.clear()
        self._input_height = _images(args, kwargs).shape[-2]

    def _hook(self, name: str, layer: Any) -> Any:
        def record(conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            input_stride = round(self._input_height / _images(args, kwargs).shape[2])
            out_size = (output.shape[2], output.shape[3])
            regular = torch.stack(
                regular_places(layer.kernel_size, out_size, layer.stride, layer.padding, layer.dilation, output),
                dim=1,
            )  # [K, 2, P]
            offset = output[0, : 2 * taps].detach().float().view(taps, 2, *out_size)
            modulated = output.shape[1] == 3 * taps * layer.deform_groups
            first_mask = 2 * taps * layer.deform_groups
            weights = (
                output[0, first_mask : first_mask + taps].detach().float().sigmoid()
                if modulated
                else torch.ones(taps, *out_size)
            )
            places = (regular.view(offset.shape) + offset) * input_stride
            self.layers.append(SampledLayer(name, input_stride * layer.stride[0], places.cpu(), weights.cpu()))

        return record


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # [B, C, H, W] or [C, H, W]
    """Give the images among what a module is called with: mmengine's models take them by keyword, or in lists."""
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.dim() in (3, 4):
            return value
    raise ValueError(
        'the model must be called with images, a tensor [B, C, H, W] or tensors [C, H, W], by position or by keyword, '
        f'got {[type(value).__name__ for value in (*args, *kwargs.values())]}'
    )
