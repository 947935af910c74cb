# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal, in Markdown."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows of text under the column names."""
    table = Table(*columns, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
