# SPDX-License-Identifier: Apache-2.0
"""What is public: one list, the same for Python, for mypy and in the documentation."""

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mmdcn

ROOT = Path(__file__).parents[1]
MODULES = [name for name in mmdcn.__all__ if isinstance(getattr(mmdcn, name), types.ModuleType)]

# A user's file: every public name has a type, and the calls have that of their results.
TYPED = f"""
from typing import assert_type
import mmdcn
import torch
from mmdcn import {', '.join(mmdcn.__all__)}
x = torch.ones(1, 4, 5, 6)
assert_type(mmdcn.ops.deform_conv2d(x, x, x), torch.Tensor)
assert_type(mmdcn.ops.deform_roi_pool(x, x, None, 2), torch.Tensor)
assert_type(mmdcn.reference.deform_conv2d(x, x, x), torch.Tensor)
assert_type(mmdcn.nn.DCNv2(4, 6, 3), mmdcn.nn.ModulatedDeformConv2dPack)
assert_type(mmdcn.DCN(4, 6, 3).stride, tuple[int, int])
assert_type(mmdcn.fuse_conv_bn(mmdcn.convert_model(torch.nn.Identity())), torch.nn.Module)
"""


def test_every_public_name_is_there_and_listed_by_dir() -> None:
    for name in mmdcn.__all__:
        assert getattr(mmdcn, name) is not None, name
    assert set(mmdcn.__all__) <= set(dir(mmdcn))
    with pytest.raises(AttributeError, match='nothing_of_this_name'):
        _ = mmdcn.nothing_of_this_name


def test_the_list_is_that_of_the_imports_that_type_checkers_read() -> None:
    tree = ast.parse(Path(mmdcn.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in (*tree.body, *checked.body) if isinstance(node, ast.ImportFrom)]
    mmdcns = {alias.name for node in imports if (node.module or '').startswith('mmdcn') for alias in node.names}
    assert mmdcns == set(mmdcn.__all__)


@pytest.mark.parametrize('name', MODULES)
def test_a_public_module_lists_what_is_public_or_hides_the_rest(name: str) -> None:
    """What a module has of its own is in its list, or has an underscore."""
    module = getattr(mmdcn, name)
    own = {
        key for key, value in vars(module).items()
        if getattr(value, '__module__', '') == module.__name__ and (inspect.isclass(value) or inspect.isfunction(value))
    }  # fmt: skip
    hidden = {key for key in own if key.startswith('_')}
    assert own - hidden <= set(getattr(module, '__all__', own))
    assert all(getattr(module, key).__doc__ for key in own - hidden)


def test_a_users_code_passes_mypys_strict_mode(tmp_path: Path) -> None:
    (tmp_path / 'user.py').write_text(TYPED)
    command = [sys.executable, '-m', 'mypy', '--strict', '--python-version=3.11', '--follow-imports=silent', 'user.py']
    environment = {'MYPYPATH': str(ROOT), 'PATH': ''}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
