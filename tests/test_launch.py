# SPDX-License-Identifier: Apache-2.0
"""mmdcn.engine.launch, which the tools share: the last checkpoint, settings of the command line, errors in one line."""

import argparse
import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from mmdcn.checkpoints.zoo import ZooError
from mmdcn.datasets import ImageError
from mmdcn.engine.launch import LaunchError, add_arguments, explained, mend_last_checkpoint, read_config
from mmdcn.engine.launch import run as run_tool


def test_a_kill_while_the_last_checkpoint_is_noted_loses_none(tmp_path: Path) -> None:
    note = tmp_path / 'last_checkpoint'
    mend_last_checkpoint(tmp_path)
    assert not note.exists()
    for second, name in enumerate(('epoch_9.pth', 'epoch_10.pth', 'best_epoch_9.pth')):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (second, second))
    kept = f'{tmp_path}/best_epoch_9.pth'
    for before, after in (('', f'{tmp_path}/epoch_10.pth'), (kept, kept)):
        note.write_text(before)
        mend_last_checkpoint(tmp_path)
        assert note.read_text() == after


def test_a_work_folder_that_was_moved_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / 'epoch_2.pth').touch()
    (tmp_path / 'last_checkpoint').write_text(f'{tmp_path}/before/epoch_2.pth')
    mend_last_checkpoint(tmp_path)
    assert (tmp_path / 'last_checkpoint').read_text() == f'{tmp_path}/epoch_2.pth'


def test_an_empty_last_checkpoint_is_mended_for_any_file_name(tmp_path: Path) -> None:
    note = tmp_path / 'last_checkpoint'
    note.touch()
    with pytest.raises(LaunchError, match='is empty, and no checkpoint is beside it'):
        mend_last_checkpoint(tmp_path)
    for name in ('model_3.pth', 'best_bbox_mAP.pth'):
        (tmp_path / name).touch()
    mend_last_checkpoint(tmp_path)
    assert note.read_text() == str(tmp_path / 'model_3.pth')


def settings(*given: str) -> dict:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(['--cfg-options', *given]).cfg_options


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('[dict(type="EMAHook")]', [dict(type='EMAHook')]),
        ("[dict(type='EMAHook', momentum=1e-3), dict(type=mmdcn.EpochSeedHook)]",
         [dict(type='EMAHook', momentum=1e-3), dict(type='mmdcn.EpochSeedHook')]),
        ('dict(type=Pretrained, checkpoint=None)', dict(type='Pretrained', checkpoint=None)),
        ('{"a": [1, -2.5], "b": (True, word)}', dict(a=[1, -2.5], b=(True, 'word'))),
        ('2', 2), ('1,2,3', [1, 2, 3]), ('[(a,b),(c,1)]', [('a', 'b'), ('c', 1)]), ('none', 'none'), ('a=b', 'a=b'),
    ],
)  # fmt: skip
def test_a_setting_of_the_command_line_may_be_a_dict_or_hold_some(text: str, value: object) -> None:
    assert settings(f'key={text}', 'other=1') == dict(key=value, other=1)


@pytest.mark.parametrize('text', ['f(1,2)', '[dict(type=f(1))]', '[1,2', 'dict(1)', '{"a": open("b")}', 'dict(**a)'])
def test_a_setting_that_is_no_value_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=f'key must be a number, a word, .*got {re.escape(repr(text))}'):
        settings(f'key={text}')


def test_a_setting_without_a_value_is_named() -> None:
    with pytest.raises(argparse.ArgumentError, match="must be KEY=VALUE, got 'key'"):
        settings('key')


def test_an_error_that_no_user_can_put_right_keeps_its_traceback() -> None:
    def defective() -> None:
        raise OSError(5, 'Input/output error', 'epoch_1.pth')

    with pytest.raises(OSError, match='Input/output error'):
        run_tool(defective)


def test_a_file_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run_tool(lambda: tmp_path.write_text('')) == 1
    assert capsys.readouterr().err == f'error: {tmp_path} cannot be written: Is a directory. Name another place\n'


@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04'])
def test_a_damaged_checkpoint_is_one_line(content: bytes, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / 'x.pth').write_bytes(content)
    assert run_tool(lambda: torch.load(tmp_path / 'x.pth', weights_only=True)) == 1
    assert capsys.readouterr().err.startswith('error: the checkpoint named above is incomplete')


def test_a_tool_that_is_stopped_says_so(capsys: pytest.CaptureFixture) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    assert run_tool(stopped) == 130
    assert capsys.readouterr().err == 'stopped\n'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ("_base_ = 'none.py'", 'cannot be read: .*none.py'),
        ('model = (', 'cannot be read: '),
        ('x = 1', 'must have a model, got x'),
    ],
)
def test_a_config_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(LaunchError, match=f'^config .*config.py {message}'):
        read_config(tmp_path / 'config.py')


@pytest.mark.parametrize('error', [LaunchError, ZooError, ImageError])
def test_an_error_that_a_user_can_put_right_is_one_line(error: type, capsys: pytest.CaptureFixture) -> None:
    def mistaken() -> None:
        raise error('what and how')

    assert run_tool(mistaken) == 1
    assert capsys.readouterr() == ('', 'error: what and how\n')


def test_a_missing_file_of_the_config_is_told_with_its_place() -> None:
    """Any other missing file keeps its traceback."""
    cfg = Config(dict(model=dict(neck=[dict(init_cfg=dict(type='Pretrained', checkpoint='none.pth'))])))
    place = r'^model.neck\[0\].init_cfg.checkpoint: none.pth does not exist'
    with pytest.raises(LaunchError, match=place), explained(cfg):
        CheckpointLoader.load_checkpoint('none.pth')
    with pytest.raises(FileNotFoundError, match='other'), explained(cfg):
        Path('other').read_text()
