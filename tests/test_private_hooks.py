# SPDX-License-Identifier: Apache-2.0
"""What mmdcn uses of others and is not public: it is there, does what mmdcn takes it for, and stands in one file."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from mmengine.analysis import complexity_analysis
from mmengine.config import DictAction
from mmengine.logging import HistoryBuffer
from torch.autograd import forward_ad

import mmdcn
from mmdcn import _private_hooks as hooks

PACKAGE = Path(mmdcn.__file__).parent
LIBRARY = r'(torch|mmengine|mmcv|mmdet|forward_ad|complexity_analysis|sys)'
PRIVATE = re.compile(
    rf'\b{LIBRARY}(\.\w+)*\._[a-zA-Z]'  # torch._C
    rf'|from {LIBRARY}[\w.]* import .*\b_[a-zA-Z]'  # from torch.nn.modules.utils import _pair
    r'|\w\(\)\._[a-z]\w*'  # HistoryBuffer()._statistics_methods, super()._wrap_model
)


@pytest.mark.parametrize('name', hooks.HOOKS)
def test_a_hook_is_there(name: str) -> None:
    """Or else what its entry says breaks."""
    try:
        resolve_name(name)
    except (AttributeError, ImportError):
        pytest.fail(f'{name} is gone. Breaks now: {hooks.HOOKS[name]}')


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_what_is_private(path: Path) -> None:
    code = re.sub(r'(?m)#.*$|"""[\s\S]*?"""|\'mmcv\._ext\'', '', path.read_text())
    overridden = {name.split('.')[-1] for name in hooks.HOOKS}
    found = [match[0] for match in PRIVATE.finditer(code) if match[0].split('.')[-1] not in overridden]
    assert path.name == '_private_hooks.py' or found == []


def test_transforms_and_levels_of_tangents_are_told() -> None:
    told = []

    def note(x: torch.Tensor) -> torch.Tensor:
        told.append(hooks.is_transformed())
        return x.sin()

    note(torch.ones(2))
    torch.func.vmap(note)(torch.ones(2))
    torch.func.grad(note)(torch.tensor(1.0))
    assert told == [False, True, True]
    assert not hooks.may_have_tangents()
    with forward_ad.dual_level():
        assert hooks.may_have_tangents()


def test_autocast_gradients_and_precision_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hooks.is_any_autocast_enabled()
    with torch.autocast('cpu'):
        assert hooks.is_any_autocast_enabled()
    assert hooks.any_requires_grad(None, (1, 2), torch.ones(1), torch.ones(1, requires_grad=True))
    assert not hooks.any_requires_grad(None, (1, 2), torch.ones(1))
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allowed)
        assert (hooks.convolution_precision() == 'tf32') == allowed


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def test_below_autograd_nothing_is_recorded_and_a_quick_apply_is_an_apply() -> None:
    x = torch.ones(3, requires_grad=True)
    with hooks.below_autograd():
        assert x.sin().grad_fn is None
    hooks.apply_quickly(Double, x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_mmengine_counts_reads_options_and_keeps_statistics_as_expected() -> None:
    hooks.count_in_mmengine('mmdcn::of_a_test', lambda *_: 3, lambda *_: 4)
    tables = (complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS, complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS)
    assert [table.pop('mmdcn::of_a_test')() for table in tables] == [3, 4]
    assert hooks.parse_option('[(1,2),a]') == [(1, 2), 'a'] == DictAction._parse_iterable('[(1,2),a]')
    assert hooks.get_statistic('mean') is HistoryBuffer.mean
    assert issubclass(mmdcn.FSDPStrategy, hooks.mmengine_fsdp().FSDPStrategy)


def test_a_caller_is_found_however_far_away() -> None:
    def ask() -> bool:
        return hooks.is_within('init_weights')

    def init_weights() -> list[bool]:
        return [ask() for _ in range(1)]

    assert init_weights() == [True] and not ask()
