# SPDX-License-Identifier: Apache-2.0
"""Writing files so that they are either complete or absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, in a temporary folder beside `path`; the file written there replaces `path` at the end.

    The file has the same name in both folders. Other files in the temporary folder move along. After an error, existing
    files are unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'{path.name}.', suffix='.partial', dir=path.parent) as folder:
        yield Path(folder, path.name)
        # The reverse order moves an ONNX model after its NAME.data.
        for written in sorted(Path(folder).iterdir(), reverse=True):
            written.replace(path.parent / written.name)
