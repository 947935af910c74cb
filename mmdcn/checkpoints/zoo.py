# SPDX-License-Identifier: Apache-2.0
"""The model zoo: the models that the metafiles name, and their weights, fetched by name and checked.

Note: [Addresses of the zoo]
In its metafile a checkpoint of mmdcn's own has two lines, which tools/model_converters/publish_model.py prints:

    Weights: mmdcn://NAME-<the first 8 digits of SHA256>.pth
    SHA256: <64 digits>

The file lies beside the config, in a checkout as in a wheel. If the environment variable `MMDCN_ZOO` is set, it lies
there instead: in a folder, or under an address that begins with file://, http:// or https://. MMEngine takes
`mmdcn://…` wherever it takes a checkpoint: `load_from`, `init_cfg=dict(type='Pretrained', ...)`, `load_checkpoint`.
The metafiles also name what mmdet has published, by its own addresses and without SHA256; those MMEngine downloads.
"""

import difflib
import hashlib
import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import load
from mmengine.runner.checkpoint import CheckpointLoader
from torch.hub import download_url_to_file

ADDRESS = 'mmdcn://'
MIM = Path(__file__).parents[1] / '.mim'


class ZooError(OSError):
    """A model or a file that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Model:
    """What a metafile says of a model.

    Attributes:
        name: Its name, which is that of its config.
        config: The path of its config.
        weights: The address of its checkpoint, for MMEngine.
        sha256: The checkpoint's hash, 64 hexadecimal digits, or None for one that mmdet has published.
        metrics: Its figures, such as {'box AP': 41.3}, in points from 0 to 100.
    """

    name: str
    config: Path
    weights: str
    sha256: str | None
    metrics: dict[str, float]


def models() -> list[Model]:
    """List the models of all metafiles."""
    metafiles = [load(MIM / path) for path in load(MIM / 'model-index.yml')['Import']]
    return [
        Model(
            name=entry['Name'],
            config=MIM / entry['Config'],
            weights=entry['Weights'],
            sha256=entry.get('SHA256'),
            metrics={name: value for result in entry.get('Results', ()) for name, value in result['Metrics'].items()},
        )
        for metafile in metafiles
        for entry in metafile['Models']
        if 'Weights' in entry
    ]


def find(name: str) -> Model:
    """Find a model by its name or by the address of its weights.

    Raises:
        ZooError: If there is none.
    """
    known = {key: model for model in models() for key in (model.weights, model.name)}
    if name not in known:
        close = ' or '.join(difflib.get_close_matches(name, known, n=3))
        raise ZooError(f'the model zoo has no {name!r}' + (f'; it has {close}' if close else ''))
    return known[name]


def fetch(name: str) -> Path:
    """Give the path of a checkpoint of mmdcn's own, once its hash is found right.

    The file is kept where torch keeps those that it downloads, `torch.hub.get_dir()`/checkpoints, and copied or
    downloaded again if it is not the right one.

    Args:
        name: The model's name, or the address of its weights.

    Raises:
        ZooError: If there is no such model, or its file cannot be fetched, or is not the one that was published.
    """
    model = find(name)
    if model.sha256 is None:
        raise ZooError(f'{name} is not published by mmdcn; let MMEngine download {model.weights}')
    filename = model.weights.removeprefix(ADDRESS)
    cached = Path(torch.hub.get_dir(), 'checkpoints', filename)
    if not (cached.is_file() and hashlib.sha256(cached.read_bytes()).hexdigest() == model.sha256):
        base = os.environ.get('MMDCN_ZOO') or str(model.config.parent)
        if '://' not in base:
            base = Path(base).expanduser().resolve().as_uri()
        url = f'{base.rstrip("/")}/{filename}'
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(cached), model.sha256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: of another hash
            raise ZooError(
                f'{url} is not to be had: {error}. Set MMDCN_ZOO to the folder or the address that has {filename}'
            ) from error
    return cached


@CheckpointLoader.register_scheme(prefixes=ADDRESS)
def load_from_zoo(filename: str, map_location: torch.serialization.MAP_LOCATION = None) -> dict[str, Any]:
    """Load a checkpoint of mmdcn's own from its address; MMEngine calls this."""
    return torch.load(fetch(filename), map_location=map_location, weights_only=True)
