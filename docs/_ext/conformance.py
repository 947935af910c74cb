# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/conformance.md: what the tests promise, read from their names and docstrings.

`python docs/_ext/conformance.py` prints them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
WORDS = (
    'AMP AOTInductor AVX2 AVX512 COCO CPU CPUs CUDA DCN DCNv1 DCNv2 DCNv3 DCNv4 DDP DeepSpeed FLOPs FSDP GPU GPUs JSON '
    'Kaiming MIM NaN NEON NMS NumPy oneDNN ONNX RGB RoI RoIAlign Student TF32 TOOD TorchScript'
)
NAMES = ('mmcv', 'mmdcn', 'mmdet', 'mmseg', 'oneDNN', 'opcheck', 'vmap')  # which begin with a small letter
SPELLINGS = {word.lower(): word for word in WORDS.split()} | {
    'mmcvs': "mmcv's",
    'mmdets': "mmdet's",
    'mmdcns': "mmdcn's",
}


class Promise(NamedTuple):
    """What one test holds."""

    test: str
    sentence: str  # its name, as prose
    details: str  # the first paragraph of its docstring
    devices: str


def as_prose(name: str) -> str:
    """Turn the name of a test, or of a file of tests, into prose."""
    words = ' '.join(SPELLINGS.get(word, word) for word in name.removeprefix('test_').split('_'))
    return words if words.startswith(NAMES) else words[0].upper() + words[1:]


def find_promises(path: Path) -> Iterator[Promise]:
    """Find the tests of a file, in its order."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
            details = (ast.get_docstring(node) or '').split('\n\n')[0].replace('\n', ' ')
            devices = 'CPU, CUDA' if 'device' in [argument.arg for argument in node.args.args] else ''
            yield Promise(node.name, as_prose(node.name), details, devices)


def tables() -> Iterator[str]:
    """Yield the lines of Markdown: a section for each file of tests."""
    operators_first = ('test_deform_', 'test_reference_')
    for path in sorted((ROOT / 'tests').glob('test_*.py'), key=lambda p: (not p.stem.startswith(operators_first), p)):
        promises = list(find_promises(path))
        if not promises:
            continue
        about = re.sub(r'\s+', ' ', (ast.get_docstring(ast.parse(path.read_text())) or '').split('\n\n')[0])
        yield from (f'\n## {as_prose(path.stem)}\n', about, f'\n[tests/{path.name}](../tests/{path.name})\n')
        yield from ('| Promise | Runs on |', '|---|---|')
        for promise in promises:
            promised = f'**{promise.sentence}.** {promise.details}' if promise.details else f'{promise.sentence}.'
            yield f'| {promised} | {promise.devices} |'


def add_tables(app: Any, document: str, source: list[str]) -> None:
    """Append the tables to their page."""
    if document == 'docs/conformance':
        source[0] += '\n'.join(tables())


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx."""
    app.connect('source-read', add_tables)
    return {'parallel_read_safe': True}


if __name__ == '__main__':
    print('\n'.join(tables()))
