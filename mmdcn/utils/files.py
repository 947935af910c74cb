# SPDX-License-Identifier: Apache-2.0
"""Files that are complete or absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, in a folder beside `path`; what is written there replaces `path` at the end.

    The name stays the same. Further files in that folder move along. After an error, older files are as they were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'{path.name}.', suffix='.partial', dir=path.parent) as folder:
        yield Path(folder, path.name)
        # An ONNX model goes after its NAME.data.
        for written in sorted(Path(folder).iterdir(), reverse=True):
            written.replace(path.parent / written.name)
