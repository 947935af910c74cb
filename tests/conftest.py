# SPDX-License-Identifier: Apache-2.0
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from compiled_mmcv import has_compiled_mmcv


@pytest.fixture(params=['cpu', 'cuda'])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the operators run on."""
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('torch finds no CUDA device')
    return request.param


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs mmcv's compiled operators where there are none, unless it is asked for by `-m mmcv_ops`."""
    if item.get_closest_marker('mmcv_ops') and not has_compiled_mmcv():
        missing = "mmcv's compiled operators are not installed: `make test-mmcv` compiles them"
        pytest.fail(missing) if item.config.option.markexpr == 'mmcv_ops' else pytest.skip(missing)


def pytest_runtest_logfinish() -> None:
    """Let pytest-xdist replace a worker whose GPU context is lost, for in it every other test would fail too."""
    if 'PYTEST_XDIST_WORKER' in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep float32 whole on CUDA, where torch's default for convolutions, and so the operators', is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """For what compares bits of gradients, which CUDA otherwise adds up in an order of its own."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small calls, whose threads would do little but wait for each other."""
    yield from with_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what only a second thread can show, on a machine with one core too."""
    yield from with_threads(2)


def with_threads(count: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def mmdet_as_it_was() -> Iterator[None]:
    """Undo the switch to mmdcn's layers, which would outlive the test: a config may have imported it."""
    yield
    registry = sys.modules.get('mmdet.registry')
    if registry and 'DCN' in registry.MODELS.module_dict:
        from mmdcn import unpatch_mmdet

        unpatch_mmdet()
