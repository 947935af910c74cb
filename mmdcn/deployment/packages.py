# SPDX-License-Identifier: Apache-2.0
"""Write exported detectors to files, with the metadata that a program needs to use them, and load them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdcn._private_hooks import compile_package, load_package
from mmdcn.deployment.detector import export
from mmdcn.utils.files import replacing

INPUTS = ('images', 'sizes')
OUTPUTS = ('boxes', 'scores', 'labels')
Detections = tuple[Tensor, Tensor, Tensor]  # what Detector.forward returns


def describe(model: Any, cfg: Config) -> dict[str, str]:
    """Describe how a program must preprocess images for a detector, and what its labels mean.

    Args:
        model: The detector.
        cfg: Its config.

    Returns:
        The metadata; numbers are separated by spaces, class names by newlines:

        - `classes`: the name of each label.
        - `channels`: `rgb` or `bgr`, the order of the channels in `images`.
        - `mean`, `std`: one value per channel, in that order; `images` are (pixel - mean) / std, for pixels from 0 to
          255.
        - `pad_size_divisor`, `pad_value`: after normalization, images are padded with this value at the right and the
          bottom, to multiples of this size.
        - `scale`, `keep_ratio`: the arguments of `Resize` in the test pipeline, if it has one.
    """
    preprocessor = model.data_preprocessor
    normalizes = preprocessor._enable_normalize
    # mmcv loads images as BGR.
    facts: dict[str, Any] = {
        'classes': '\n'.join(model.dataset_meta['classes']),
        'channels': 'rgb' if preprocessor._channel_conversion else 'bgr',
        'mean': preprocessor.mean.flatten().tolist() if normalizes else [0.0] * 3,
        'std': preprocessor.std.flatten().tolist() if normalizes else [1.0] * 3,
        'pad_size_divisor': preprocessor.pad_size_divisor,
        'pad_value': preprocessor.pad_value,
    }
    for transform in cfg.get('test_pipeline', ()):
        if transform['type'].split('.')[-1] == 'Resize':
            facts |= {key: transform[key] for key in ('scale', 'keep_ratio') if key in transform}
    return {key: _text(value) for key, value in facts.items()}


def _text(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def export_onnx(model: nn.Module, path: Path | str, metadata: dict[str, str], **settings: Any) -> None:
    """Write a detector as an ONNX model that uses only standard operators.

    Args:
        model: The detector.
        path: The file to write.
        metadata: The result of `describe`, possibly with more entries, for the model's `metadata_props`.
        settings: Arguments of `mmdcn.deployment.export`.

    Raises:
        NotImplementedError: If the detector, or a part of it, predicts in a way that cannot be exported.
        ValueError: If its `test_cfg` sets a suppression other than `nms`, or does not limit the number of boxes.
    """
    from mmdcn.onnx import TRANSLATIONS  # needs onnxscript

    program = torch.onnx.export(
        export(model, **settings),
        input_names=INPUTS,
        output_names=OUTPUTS,
        custom_translation_table=TRANSLATIONS,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # dynamo=True always returns a program
    program.model.metadata_props.update(metadata)
    with replacing(Path(path)) as beside:
        program.save(beside)


def export_aoti(model: nn.Module, path: Path | str, metadata: dict[str, str], **settings: Any) -> None:
    """Compile a detector with AOTInductor, for machines of the same kind as this one.

    Args:
        model: The detector, on the device that it will run on.
        path: The file to write. Its name must end with .pt2.
        metadata: The result of `describe`, possibly with more entries, for the package's metadata.
        settings: Arguments of `mmdcn.deployment.export`.

    Raises:
        NotImplementedError: If the detector, or a part of it, predicts in a way that cannot be exported.
        ValueError: If its `test_cfg` sets a suppression other than `nms`, or does not limit the number of boxes, or
            the file name does not end with .pt2.
    """
    if Path(path).suffix != '.pt2':
        raise ValueError(f'the name of a package must end with .pt2, got {path}')
    with replacing(Path(path)) as beside:
        compile_package(export(model, **settings), str(beside), metadata)


def load(path: Path | str) -> Callable[[Tensor, Tensor], Detections]:
    """Load a file of `export_onnx` or `export_aoti`; ONNX Runtime runs the former, on the CPU.

    Args:
        path: The file. Its name must end with .onnx or .pt2.

    Returns:
        A function with the arguments and results of `Detector.forward`.

    Raises:
        ValueError: If the name has another ending.
    """
    suffix = Path(path).suffix
    if suffix == '.pt2':
        return load_package(str(path))
    if suffix != '.onnx':
        raise ValueError(f'the name of an exported detector must end with .onnx or .pt2, got {path}')
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])

    def detect(images: Tensor, sizes: Tensor) -> Detections:
        arrays = session.run(OUTPUTS, dict(zip(INPUTS, (images.cpu().numpy(), sizes.cpu().numpy()), strict=True)))
        boxes, scores, labels = map(torch.from_numpy, arrays)
        return boxes, scores, labels

    return detect
