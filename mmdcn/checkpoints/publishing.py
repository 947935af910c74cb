# SPDX-License-Identifier: Apache-2.0
"""Publishing the checkpoint of a training: only its weights, in a file named after its sha256."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from mmdcn.checkpoints.safe_globals import load_training
from mmdcn.engine.launch import LaunchError, build_model
from mmdcn.utils.files import replacing
from mmdcn.version import __version__


@dataclass(frozen=True)
class Published:
    """A published file, and its hash of 64 hexadecimal digits."""

    path: Path
    sha256: str


def publish(config: Path, checkpoint: Path, out_dir: Path, half: bool = False) -> Published:
    """Write the weights of a training, its classes, the text of its config and the version of mmdcn.

    Args:
        config: The config of the training; the file is named after it.
        checkpoint: The training's checkpoint. With an EMAHook it contains the averaged weights, which are then
            written.
        out_dir: The folder to write into.
        half: Whether to store float16; a model that loads the weights still computes in float32.

    Raises:
        LaunchError: If the file is not a training checkpoint of MMEngine, its weights do not fit the config's model, or
            some are not finite.
    """
    trained = _load(checkpoint)
    weights = trained['state_dict']
    for key, value in weights.items():
        if half and value.is_floating_point():
            weights[key] = value.half()
    _check(weights, config)
    meta = dict(
        dataset_meta=dict(classes=trained['classes']),
        cfg=Config.fromfile(config).pretty_text,
        mmdcn_version=__version__,
    )
    # torch.save would write the name of a file into it, which would change the hash.
    buffer = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    out = out_dir / f'{config.stem}-{sha256[:8]}.pth'
    with replacing(out) as beside:
        beside.write_bytes(buffer.getvalue())
    return Published(out, sha256)


def _load(path: Path) -> dict[str, Any]:
    try:
        checkpoint = load_training(path)
        return {'state_dict': checkpoint['state_dict'], 'classes': checkpoint['meta']['dataset_meta']['classes']}
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise LaunchError(f'{path} is not a training checkpoint of MMEngine: {error}') from error


def _check(state_dict: dict[str, Tensor], config: Path) -> None:
    """Check that the weights fit the config's model and are finite."""
    expected = {key: tuple(value.shape) for key, value in build_model(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state_dict.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise LaunchError(
                f'the checkpoint does not fit {config}: {key} is {found.get(key, "missing")} in it and '
                f'{expected.get(key, "missing")} in the model; give the config that it was trained with'
            )
    for key, value in state_dict.items():
        if not value.isfinite().all():
            raise LaunchError(f'{key} has values that are infinite or NaN; if it had none, publish without --half')
