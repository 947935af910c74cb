# SPDX-License-Identifier: Apache-2.0
"""Run a detector on an image, and record its detections and sampling locations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from torch import Tensor

from mmdcn.engine.launch import LaunchError
from mmdcn.visualization.drawing import Detection, Picture
from mmdcn.visualization.receptive_field import effective_receptive_field
from mmdcn.visualization.sampling_points import SampledLayer, SamplingRecorder


@dataclass
class Inspection:
    """The detections on an image, and the sampling of the deformable layers that produced them."""

    model: Any
    picture: Picture
    recorder: SamplingRecorder
    detections: list[Detection]  # in descending order of score
    inputs: Tensor  # [1, 3, H, W], the network's input

    @property
    def names(self) -> list[str]:
        """The names of the layers, in the order in which they ran."""
        return [layer.name for layer in self.recorder.layers]

    def field(self, layer: SampledLayer, y: float, x: float) -> Tensor:  # [H, W]
        """Return the effective receptive field of a backbone layer, at its position nearest to a location.

        Args:
            layer: The layer.
            y: The y coordinate of the location, in pixels of the image.
            x: The x coordinate.

        Raises:
            ValueError: If the layer is not part of the backbone.
        """
        place = layer.grid.positions(torch.tensor(self.picture.to_input(y, x))).round().long()
        size = torch.tensor(layer.places.shape[-2:])
        i, j = place.clamp(min=torch.zeros(2).long(), max=size - 1).tolist()
        name = layer.name.removeprefix('backbone.')
        return effective_receptive_field(self.model.backbone, self.inputs, name, (i, j)).cpu()


def inspect(model: Any, path: str | Path, score: float = 0.3) -> Inspection:
    """Run a detector on an image, and record where its deformable layers sample.

    Args:
        model: The detector, as `mmdcn.engine.loading.load_detector` returns it.
        path: The image file.
        score: The minimum score of a detection.

    Raises:
        LaunchError: If the image cannot be read, or the detector has no deformable layer.
    """
    pixels = _read(path)
    pipeline = get_test_pipeline_cfg(model.cfg.copy())
    pipeline[0].type = 'mmdet.LoadImageFromNDArray'
    data = Compose(pipeline)(dict(img=pixels, img_id=0))
    batch = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        inputs = model.data_preprocessor(batch, False)
        (sample,) = model(**inputs, mode='predict')
    if not recorder.layers:
        raise LaunchError('the detector has no deformable layer: pass a config with dcn=dict(type=...) in its backbone')
    scale_x, scale_y = sample.metainfo.get('scale_factor', (1.0, 1.0))
    picture = Picture(np.ascontiguousarray(pixels[..., ::-1]), (scale_y, scale_x))
    detections = detections_of(sample, model.dataset_meta.get('classes', ()), score)
    return Inspection(model, picture, recorder, detections, inputs['inputs'])


def _read(path: str | Path) -> np.ndarray[Any, Any]:  # [H, W, 3], BGR
    if not Path(path).is_file():
        raise LaunchError(f'image {path} does not exist')
    pixels = mmcv.imread(str(path))
    if pixels is None:
        raise LaunchError(f'{path} could not be read as an image')
    return pixels


def detections_of(sample: DetDataSample, classes: Sequence[str], score: float) -> list[Detection]:
    """Return the boxes of a sample whose score is at least `score`, in descending order of score."""
    found = sample.pred_instances.cpu()
    found = found[found.scores >= score]
    found = found[found.scores.argsort(descending=True)]
    detections = []
    for box, label, value in zip(found.bboxes, found.labels.tolist(), found.scores.tolist(), strict=True):
        left, top, right, bottom = box.tolist()
        name = classes[label] if label < len(classes) else str(label)
        detections.append(Detection(left, top, right, bottom, name, value))
    return detections
