# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of the file at the end; after an error that file is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'{path.name}.{os.getpid()}.partial')
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
