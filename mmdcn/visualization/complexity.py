# SPDX-License-Identifier: Apache-2.0
"""What each part of a detector computes and holds."""

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
    """What one module does itself, without its children, on one image."""

    name: str
    kind: str  # its class
    parameters: int
    activations: int  # numbers in the outputs of convolutions, linear layers and mmdcn's operators
    flops: int  # multiply-adds, as mmengine counts them
    flops_of_torch: int  # floating-point operations of matrix products and mmdcn's operators, as torch counts them


@dataclass(frozen=True)
class DetectorComplexity:
    """The layers that compute or hold anything, and the operators that mmengine does not count."""

    layers: list[LayerComplexity]
    uncounted: dict[str, int]  # how often each is called

    def total(self, what: str) -> int:
        """Return the sum of one figure, such as `flops`, over the layers."""
        return sum(getattr(layer, what) for layer in self.layers)


def detector_complexity(model: Any, height: int, width: int) -> DetectorComplexity:
    """Count what a detector of mmdet does with one image, up to what its heads give; not the boxes' postprocessing.

    The image is noise. In a detector of two stages the number of regions, and so what the second stage computes,
    depends on the image and the weights.

    Args:
        model: The detector. It is put into evaluation mode.
        height: Of the image, in pixels, before it is padded to the size that the detector asks for.
        width: Likewise.
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
    """Return what each module counts beyond the modules inside it, of which some may be missing."""
    own = Counter({name: int(count) for name, count in counts.items()})
    for name, count in counts.items():
        parts = name.split('.')
        around = ['.'.join(parts[:length]) for length in range(len(parts) - 1, -1, -1)] if name else []
        nearest = next((module for module in around if module in counts), None)
        if nearest is not None:
            own[nearest] -= int(count)
    return own
