# SPDX-License-Identifier: Apache-2.0
"""The sections of docs/api.md: every public name of the modules below, with its docstring.

Shapes stand in comments beside the arguments in the source; here they are put into the descriptions of the arguments.
"""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

SECTIONS = {
    'mmdcn.ops': 'Operators',
    'mmdcn': 'Layers, parts of detectors, switches',
    'mmdcn.nn': 'Layers with torch alone',
    'mmdcn.visualization': 'Looking inside',
    'mmdcn.checkpoints': 'Checkpoints',
    'mmdcn.checkpoints.zoo': 'Model zoo',
    'mmdcn.checkpoints.layouts': 'Offset layouts',
    'mmdcn.reference': 'Definitions in plain PyTorch',
    'mmdcn.reference.conv2d': 'The convolution family in plain PyTorch',
}
SHAPE = re.compile(r'^ +(\w+): .*# (\[.*\])', re.MULTILINE)


def public_names(module: ModuleType) -> Iterator[str]:
    """Yield the names of the functions and classes that a module offers, in its order."""
    own = [name for name, value in vars(module).items() if getattr(value, '__module__', None) == module.__name__]
    for name in getattr(module, '__all__', [name for name in own if not name.startswith('_')]):
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name


def sections() -> Iterator[str]:
    """Yield the lines of the page."""
    for path, title in SECTIONS.items():
        module = import_module(path)
        yield f'\n## {title}\n\n`{path}`: {inspect.getdoc(module)}\n'
        for name in public_names(module):
            value = getattr(module, name)
            directive = [f'.. auto{"class" if inspect.isclass(value) else "function"}:: {path}.{name}']
            if inspect.isclass(value) and value.__name__ == name:  # an alias is only named
                directive += ['   :members:']
            yield '\n'.join(['```{eval-rst}', *directive, '```'])


def add_sections(app: Any, document: str, source: list[str]) -> None:
    """Append the sections to their page."""
    if document == 'docs/api':
        source[0] += '\n'.join(sections())


def add_shapes(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Begin the description of each tensor with its shape, and mark an example as code."""
    if 'Example:' in lines:
        number = lines.index('Example:')
        lines[number : number + 1] = ['Example::', '']
    if inspect.isfunction(value):
        for argument, shape in SHAPE.findall(inspect.getsource(value)):
            for number, line in enumerate(lines):
                if line.startswith(f'    {argument}: '):
                    lines[number] = line.replace(f'{argument}: ', f'{argument}: ``{shape}``. ', 1)


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx. The shapes come before Napoleon turns the docstrings into its own markup."""
    app.connect('source-read', add_sections)
    app.connect('autodoc-process-docstring', add_shapes, priority=100)
    return {'parallel_read_safe': True}
