# SPDX-License-Identifier: Apache-2.0
"""Run the Python blocks of a page, in order and in one namespace.

`python docs/_ext/code_blocks.py docs/PAGE.md` runs them in the folder of the page, which draws its pictures anew.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = re.compile(r'^```python\n(?P<code>.*?)^```\n(?:\n?```text\n(?P<printed>.*?)^```$)?', re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of Python code, and the block of text right after it: what it prints."""

    code: str
    printed: str | None
    line: int  # of the page, on which the code begins


def find_blocks(page: Path) -> Iterator[Block]:
    """Find the Python blocks of a page."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield Block(match['code'], match['printed'], text.count('\n', 0, match.start('code')) + 1)


def run_blocks(page: Path) -> Iterator[tuple[Block, str]]:
    """Run the blocks in order, and yield each with what it printed. Tracebacks have the lines of the page."""
    namespace: dict[str, Any] = {}
    for block in find_blocks(page):
        code = compile('\n' * (block.line - 1) + block.code, str(page), 'exec')
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        yield block, printed.getvalue()


if __name__ == '__main__':
    page = Path(sys.argv[1]).resolve()
    os.chdir(page.parent)
    for _, printed in run_blocks(page):
        print(printed, end='')
