# SPDX-License-Identifier: Apache-2.0
"""The offset explorer: an HTML page that shows where each layer samples for the location under the pointer."""

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from mmdcn.visualization.drawing import Detection, Picture
from mmdcn.visualization.sampling_points import SampledLayer, SamplingRecorder

_NOT_FINITE = -32768  # marks an offset that is not finite; finite offsets have -32767 to 32767 units


def explorer_page(
    picture: Picture, recorder: SamplingRecorder, detections: Sequence[Detection], title: str, subtitle: str = ''
) -> str:
    """Return the explorer as one HTML page, which needs no other file, server or network.

    Offsets are rounded to 1/32767 of their layer's largest offset, masks to 1/255.

    Args:
        picture: The image.
        recorder: The recorder of a run of the network on this image.
        detections: The boxes that the reader can choose.
        title: The title of the page.
        subtitle: A line below the title.
    """
    height, width = picture.pixels.shape[:2]
    data = dict(
        title=title,
        subtitle=subtitle,
        height=height,
        width=width,
        image=_data_url(picture.pixels),
        layers=[_describe(layer, picture) for layer in recorder.layers],
        detections=[
            dict(
                box=[round(side, 1) for side in (found.left, found.top, found.right, found.bottom)],
                label=found.label,
                score=round(found.score, 3),
                layer=recorder.layers.index(recorder.layer_for(found.size * picture.scale[0])),
            )
            for found in detections
        ],
    )
    text = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')  # so that no text can end the script element
    page = files('mmdcn.visualization').joinpath('explorer.html').read_text(encoding='utf-8')
    return page.replace('{{ data }}', text)


def _data_url(pixels: np.ndarray[Any, Any]) -> str:
    _, encoded = cv2.imencode('.jpg', np.ascontiguousarray(pixels[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return 'data:image/jpeg;base64,' + base64.b64encode(encoded.tobytes()).decode()


def _describe(layer: SampledLayer, picture: Picture) -> dict[str, Any]:
    """Return the data of a layer for the page, in pixels of the image."""
    scale = np.array(picture.scale)
    stride, start = np.array(layer.grid.stride), np.array(layer.grid.start)
    offset = layer.offset.double().numpy() * np.array(layer.input_stride)[:, None, None] / scale[:, None, None]
    finite = np.isfinite(offset).all(2, keepdims=True)
    offset = np.where(finite, offset, 0)
    unit = np.abs(offset).max(axis=(0, 1, 3, 4)).clip(1e-6) / 32767
    rounded = np.where(finite, np.rint(offset / unit[:, None, None]), _NOT_FINITE).astype('<i2')
    corner = layer.regular[:, :, 0, 0].double().numpy()  # [K, 2], the taps of position (0, 0)
    return dict(
        name=layer.name,
        stride=(stride / scale).tolist(),
        start=((start + 0.5) / scale - 0.5).tolist(),
        network_stride=f'{layer.grid.stride[0]:g}',
        size=list(layer.places.shape[-2:]),
        groups=len(layer.places),
        taps=((corner - start) / scale).round(3).tolist(),
        unit=unit.tolist(),
        offset=base64.b64encode(rounded.tobytes()).decode(),
        mask=_bytes(layer.masks) if layer.modulated else None,
        previous=layer.grid.layer,
    )


def _bytes(masks: Tensor) -> str:
    return base64.b64encode((masks.nan_to_num(0) * 255).round().byte().numpy().tobytes()).decode()
