# SPDX-License-Identifier: Apache-2.0
"""The model zoo: finding the models of the metafiles by name, and fetching and checking their weights.

Note: [Addresses of the zoo]
A checkpoint published by mmdcn has two lines in its metafile, which tools/model_converters/publish_model.py prints:

    Weights: mmdcn://NAME-<the first 8 digits of SHA256>.pth
    SHA256: <64 digits>

In a checkout the file is beside the config; the distribution `mmdcn-zoo` contains it for users of the wheel. The
environment variable `MMDCN_ZOO` overrides both: it is a folder, or an address that begins with file://, http:// or
https://. MMEngine accepts `mmdcn://…` wherever it accepts a checkpoint: `load_from`,
`init_cfg=dict(type='Pretrained', ...)`, `load_checkpoint`. The metafiles also list checkpoints published by mmdet, with
mmdet's addresses and without SHA256; MMEngine downloads those.
"""

import difflib
import hashlib
import os
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from mmengine.fileio import load
from mmengine.runner.checkpoint import CheckpointLoader
from torch.hub import download_url_to_file

ADDRESS = 'mmdcn://'
MIM = Path(__file__).parents[1] / '.mim'


class ZooError(OSError):
    """A model or a file that cannot be found or fetched; the message says what to do."""


@dataclass(frozen=True)
class Model:
    """A model's entry in a metafile.

    Attributes:
        name: Its name, which is that of its config.
        config: The path of its config.
        weights: The address of its checkpoint, for MMEngine.
        sha256: The checkpoint's hash, 64 hexadecimal digits, or None for a checkpoint that mmdet has published.
        metrics: Its metrics, such as {'box AP': 41.3}, in points from 0 to 100.
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
    """Check the hash of a checkpoint published by mmdcn, and return its path.

    A file on the disk is used in place. A file from http(s) is downloaded to torch's folder for checkpoints,
    `torch.hub.get_dir()`/checkpoints, and downloaded again if its hash differs.

    Args:
        name: The model's name, or the address of its weights.

    Raises:
        ZooError: If there is no such model, or its file cannot be found or fetched, or its hash differs.
    """
    model = find(name)
    if model.sha256 is None:
        raise ZooError(f'{name} is not published by mmdcn; let MMEngine download {model.weights}')
    filename = model.weights.removeprefix(ADDRESS)
    cached = Path(torch.hub.get_dir(), 'checkpoints', filename)
    base = os.environ.get('MMDCN_ZOO', '').rstrip('/')
    remote = base.startswith(('http://', 'https://'))
    wrong = []
    for path in (cached,) if remote else (*_places(model, base, filename), cached):
        if path.is_file():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found == model.sha256:
                return path
            wrong.append(f'{path} has sha256 {found}, not {model.sha256}; ')
    if remote:
        return _download(f'{base}/{filename}', cached, model.sha256)
    if base:
        raise ZooError(
            f'{"".join(wrong)}MMDCN_ZOO must be a folder, or an address that begins with file://, http:// or https://, '
            f'and contain {filename}, got {base}'
        )
    raise ZooError(
        f'{"".join(wrong)}{filename} is not on this machine: install it with `pip install --upgrade mmdcn-zoo`, or set '
        'MMDCN_ZOO to a folder or an address that contains it'
    )


def _places(model: Model, base: str, filename: str) -> list[Path]:
    """List the paths on the disk where the file of a model may be."""
    if base:
        folder = url2pathname(urlsplit(base).path) if base.startswith('file://') else base
        return [Path(folder).expanduser().absolute() / filename]
    package = find_spec('mmdcn_zoo')
    folders = [] if package is None else package.submodule_search_locations or []
    return [model.config.with_name(filename), *(Path(folder, filename) for folder in folders)]


def _download(url: str, path: Path, sha256: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(url, str(path), sha256)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash differs
        raise ZooError(
            f'{url} could not be fetched: {error}. Set MMDCN_ZOO to a folder or an address that contains {path.name}'
        ) from error
    return path


@CheckpointLoader.register_scheme(prefixes=ADDRESS)
def load_from_zoo(filename: str, map_location: torch.serialization.MAP_LOCATION = None) -> dict[str, Any]:
    """Load a checkpoint published by mmdcn from its address; MMEngine calls this."""
    return torch.load(fetch(filename), map_location=map_location, weights_only=True)
