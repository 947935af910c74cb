# SPDX-License-Identifier: Apache-2.0
"""Counts long files, long functions and repeated lines in each folder, and only long files in tests.

It fails if there are any.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lizard
from lizard_languages.clike import CLikeReader
from tabulate import tabulate

FOLDERS = ('mmdcn', 'tools', 'csrc', 'benchmarks', 'tests')
ENDINGS = ('.py', '.h', '.cpp', '.cu', '.cuh')
FILE_LINES, FUNCTION_LINES, REPEATED_LINES = 400, 60, 6

CLikeReader.ext += ['cu', 'cuh']


def long_files(files: list[str]) -> Iterator[str]:
    """Find the files that have more lines than a file should."""
    for file in files:
        lines = len(Path(file).read_text().splitlines())
        if lines > FILE_LINES:
            yield f'{file}: {lines} lines, at most {FILE_LINES}'


def long_functions(files: list[str]) -> Iterator[str]:
    """Find the functions that have more lines than a function should."""
    for file in files:
        for function in lizard.analyze_file(file).function_list:
            if function.length > FUNCTION_LINES:
                lines = f'{function.length} lines, at most {FUNCTION_LINES}'
                yield f'{file}:{function.start_line}: {function.name}: {lines}'


def repetitions(files: list[str]) -> Iterator[str]:
    """Find what stands in two places, as pylint does; imports, and in Python signatures, may."""
    python = ['--ignore-imports', '--ignore-signatures'] if files[0].endswith('.py') else []
    command = [sys.executable, '-m', 'pylint.checkers.symilar', '-d', str(REPEATED_LINES), *python, *files]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    yield from re.findall(r'^\d+ similar lines in .*?(?=\n\n\d+ similar|\nTOTAL)', output, re.DOTALL | re.MULTILINE)


def main() -> None:
    """Print the counts, and then each place."""
    tracked = subprocess.run(['git', 'ls-files', *FOLDERS], capture_output=True, text=True, check=True).stdout.split()
    rows, places = [], []
    for folder in FOLDERS:
        files = [name for name in tracked if name.startswith(f'{folder}/') and name.endswith(ENDINGS)]
        checks = [long_files] if folder == 'tests' else [long_files, long_functions, repetitions]
        found = [list(check(files)) for check in checks]
        rows.append([folder, len(files), *map(len, found)])
        places += [place for kind in found for place in kind]
    headers = ['folder', 'files', f'over {FILE_LINES} lines', f'functions over {FUNCTION_LINES}', 'repetitions']
    print(tabulate(rows, headers=headers))
    if places:
        sys.exit('\n'.join(['', *places]))


if __name__ == '__main__':
    main()
