# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mmengine load with `weights_only=True`, and nothing that could do harm does."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub

from mmdcn.checkpoints.safe_globals import load_training


def test_the_log_beside_the_weights_is_loaded_with_them(tmp_path: Path) -> None:
    hub = MessageHub('test_safe_globals')
    for loss in (3, 2.5, np.float32(1)):
        hub.update_scalar('train/loss', loss)
    hub.update_info('epoch', np.int64(2))
    torch.save({'state_dict': {'weight': torch.arange(3)}, 'message_hub': hub.state_dict()}, tmp_path / 'epoch.pth')
    checkpoint = load_training(tmp_path / 'epoch.pth')
    assert checkpoint['state_dict']['weight'].tolist() == [0, 1, 2]
    loss = checkpoint['message_hub']['log_scalars']['train/loss']
    assert (loss.min(), loss.max(), loss.current()) == (1, 3, 1)
    assert checkpoint['message_hub']['runtime_info'] == {'epoch': 2}


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize('harm', [Call(eval, '1'), Call(getattr, HistoryBuffer, '__init__')], ids=['eval', 'getattr'])
def test_no_other_thing_is_loaded(harm: Call, tmp_path: Path) -> None:
    torch.save({'harm': harm}, tmp_path / 'harm.pth')
    with pytest.raises((pickle.UnpicklingError, KeyError)):
        load_training(tmp_path / 'harm.pth')


def test_the_scope_of_mmdcn_lets_any_tool_load_a_training(tmp_path: Path) -> None:
    """mmdet's own tools import mmdcn as a config asks for its layers, and then load a checkpoint."""
    torch.save({'state_dict': {}, 'cfg': ConfigDict(lr=1), 'loss': HistoryBuffer([1.0], [1])}, tmp_path / 'epoch.pth')
    code = "import sys, torch, mmdcn.registry; print(torch.load(sys.argv[1], weights_only=True)['cfg'])"
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, tmp_path / 'epoch.pth'], check=True, capture_output=True, text=True
    )
    assert "{'lr': 1}" in result.stdout
