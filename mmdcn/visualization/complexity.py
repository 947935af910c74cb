# SPDX-License-Identifier: Apache-2.0
"""Parameters, activations and FLOPs of each layer of a detector."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmdcn.modules.complexity  # noqa: F401  (so that mmengine counts mmdcn's operators)


@dataclass(frozen=True)
class LayerComplexity:
    """The figures of one module for one image, without those of its child modules."""

    name: str
    kind: str  # its class
    parameters: int
    activations: int  # elements in the outputs of convolutions, linear layers and mmdcn's operators
    flops: int  # multiply-adds, as mmengine counts them
    flops_of_torch: int  # floating-point operations of matrix products and mmdcn's operators, as torch counts them


@dataclass(frozen=True)
class DetectorComplexity:
    """The layers with parameters or a nonzero count, and the operators that mmengine does not count."""

    layers: list[LayerComplexity]
    uncounted: dict[str, int]  # number of calls of each operator

    def total(self, what: str) -> int:
        """Return the sum of one figure, such as `flops`, over the layers."""
        return sum(getattr(layer, what) for layer in self.layers)


def detector_complexity(model: Any, height: int, width: int) -> DetectorComplexity:
    """Count the computation of an mmdet detector on one image, up to the outputs of its heads.

    The postprocessing of the boxes is not counted. The image is random noise. In a two-stage detector, the number of
    regions depends on the image and the weights, and with it the cost of the second stage.

    Args:
        model: The detector. It is switched to evaluation mode.
        height: The height of the image in pixels, before it is padded to the size that the detector needs.
        width: The width, likewise.
    """
    model.eval()
    data = model.data_preprocessor(_batch(height, width), False)
    forward = model.forward
    model.forward = partial(forward, data_samples=data['data_samples'], mode='tensor')
    try:
        with torch.no_grad():
            flops = FlopAnalyzer(model, data['inputs']).unsupported_ops_warnings(False)
            flops.uncalled_modules_warnings(False)
            activations = ActivationAnalyzer(model, data['inputs']).unsupported_ops_warnings(False)
            activations.uncalled_modules_warnings(False)
            by_mmengine, held = flops.by_module(), activations.by_module()
            uncounted = dict(flops.unsupported_ops())
            with FlopCounterMode(display=False) as counter:
                model(data['inputs'])
    finally:
        model.forward = forward
    counts = [_own(held), _own(by_mmengine), _own(_of_torch(model, counter))]
    layers = []
    for name, module in model.named_modules():
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        own = [count[name] for count in counts]
        if parameters or any(own):
            layers.append(LayerComplexity(name, type(module).__name__, parameters, *own))
    return DetectorComplexity(layers, uncounted)


def _batch(height: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    size = (height, width)
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0))
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    return dict(inputs=[image], data_samples=[sample])


def _of_torch(model: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix('.'): sum(operators.values())
        for name, operators in counter.get_flop_counts().items()
        if name != 'Global'
    }


def _own(counts: Mapping[str, float]) -> Counter[str]:
    """Subtract from each module's count the counts of the modules inside it, some of which may be missing."""
    own = Counter({name: int(count) for name, count in counts.items()})
    for name, count in counts.items():
        parts = name.split('.')
        around = ['.'.join(parts[:length]) for length in range(len(parts) - 1, -1, -1)] if name else []
        nearest = next((module for module in around if module in counts), None)
        if nearest is not None:
            own[nearest] -= int(count)
    return own
