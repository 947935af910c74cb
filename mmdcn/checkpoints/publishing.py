# SPDX-License-Identifier: Apache-2.0
"""From a training's checkpoint to one that is published: the weights alone, named after their sha256."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

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
        config: The config of the training; the file gets its name.
        checkpoint: The training's checkpoint. With an EMAHook it has the averages, and so has what is written.
        out_dir: The folder to write into.
        half: Whether to store float16; what loads it computes in float32 again.

    Raises:
        LaunchError: If the checkpoint is not of a training by MMEngine, its weights are not those of the config's
            model, or some are not finite.
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
    # A file's name would become part of its bytes, and so of the hash.
    buffer = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    out = out_dir / f'{config.stem}-{sha256[:8]}.pth'
    with replacing(out) as beside:
        beside.write_bytes(buffer.getvalue())
    return Published(out, sha256)


def _load(path: Path) -> dict:
    try:
        checkpoint = load_training(path)
        return {'state_dict': checkpoint['state_dict'], 'classes': checkpoint['meta']['dataset_meta']['classes']}
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise LaunchError(f'{path} is no checkpoint of a training by MMEngine: {error}') from error


def _check(state_dict: dict[str, Tensor], config: Path) -> None:
    """Check that the weights are those of the config's model, and numbers."""
    expected = {key: tuple(value.shape) for key, value in build_model(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state_dict.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise LaunchError(
                f'the checkpoint is not of {config}: {key} is {found.get(key, "missing")} in it and '
                f'{expected.get(key, "missing")} in the model; give the config that it was trained with'
            )
    for key, value in state_dict.items():
        if not value.isfinite().all():
            raise LaunchError(f'{key} has values that are infinite or NaN; if it had none, publish without --half')
