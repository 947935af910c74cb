# SPDX-License-Identifier: Apache-2.0
"""The tool that converts checkpoints: what it writes and prints, and what it refuses in one line."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_cases import Beside, dcn, detectron2_name, randomize
from mmengine.logging import MMLogger

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
TOOL = runpy.run_path(str(ROOT / 'tools/model_converters/convert_checkpoint.py'))


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, arguments)])
    return TOOL['run'](TOOL['main'])


def test_the_tool_converts_a_detector_and_tells_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = randomize(TOOL['build_model'](CONFIG)).float()
    state = {f'module.{key.replace(".conv_offset", "_offset")}': value for key, value in model.state_dict().items()}
    meta = dict(CLASSES=('zero', 'one'), epoch=12)
    torch.save(dict(state_dict=state | {'module.extra': torch.ones(2)}, meta=meta), tmp_path / 'old.pth')
    del state['module.backbone.conv1.weight']
    out = tmp_path / 'new/converted.pth'
    assert convert(monkeypatch, 'mmdet-v1', tmp_path / 'old.pth', out, '--config', CONFIG) == 0
    converted = torch.load(out, weights_only=True)
    assert converted['meta'] == meta
    lost = model.load_state_dict(converted['state_dict'], strict=False)
    assert lost.unexpected_keys == ['extra']
    assert not lost.missing_keys
    assert all(torch.equal(value, converted['state_dict'][key]) for key, value in model.state_dict().items())
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()]
    keys = [f'backbone.layer#.#.conv#{name}.weight' for name in ('_offset', '.conv_offset')]
    assert [*keys, '6', '[27, 64, 3, 3]'] in rows
    assert ['extra', '1'] in rows


def test_the_tool_takes_numpys_tensors_of_detectron2_into_a_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = randomize(TOOL['build_model'](CONFIG).backbone).float()
    state = {
        detectron2_name(key): value.numpy() for key, value in model.state_dict().items() if 'num_batches' not in key
    } | {'proposal_generator.rpn_head.conv.weight': np.zeros(3)}
    torch.save(dict(model=state, iteration=9), tmp_path / 'd2.pth')
    out = tmp_path / 'backbone.pth'
    assert convert(monkeypatch, 'detectron2', tmp_path / 'd2.pth', out, '--config', CONFIG) == 0
    converted = torch.load(out, weights_only=True)['state_dict']
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in converted.items())
    assert len(converted) == len(state) - 1
    printed = capsys.readouterr().out
    assert 'left out' in printed
    assert 'proposal_generator.rpn_head.conv.weight' in printed


def a_pickle(folder: Path) -> tuple[Path, str]:
    (folder / 'model.pkl').write_bytes(b'')
    return folder / 'model.pkl', 'is a pickle, which can run any code'


def more_than_weights(folder: Path) -> tuple[Path, str]:
    torch.save(dict(state_dict={}, hook=MMLogger), folder / 'more.pth')
    return folder / 'more.pth', 'contains mmengine.logging.logger.MMLogger; save only its'


def half_a_file(folder: Path) -> tuple[Path, str]:
    torch.save(dcn(3).state_dict(), folder / 'half.pth')
    (folder / 'half.pth').write_bytes((folder / 'half.pth').read_bytes()[:3000])
    return folder / 'half.pth', 'is not a file of weights, or is incomplete'


def no_weights(folder: Path) -> tuple[Path, str]:
    torch.save(dict(meta=dict()), folder / 'none.pth')
    return folder / 'none.pth', 'has no weights'


def other_shapes(folder: Path) -> tuple[Path, str]:
    state = {f'backbone.layer2.0.conv2.{key}': value for key, value in dcn(3).state_dict().items()}
    torch.save({key.replace('.conv_offset', '_offset'): value for key, value in state.items()}, folder / 'small.pth')
    return (
        folder / 'small.pth',
        'the model cannot do what the checkpoint was trained for: backbone.layer2.0.conv2.weight',
    )


def nothing_there(folder: Path) -> tuple[Path, str]:
    return folder / 'gone.pth', 'No such file'


@pytest.mark.parametrize('make', [a_pickle, more_than_weights, half_a_file, no_weights, other_shapes, nothing_there])
def test_the_tool_refuses_in_one_line_and_writes_nothing(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path, message = make(tmp_path)
    before = set(tmp_path.iterdir())
    assert convert(monkeypatch, 'mmdet-v1', path, tmp_path / 'out.pth', '--config', CONFIG) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ')
    assert message in error
    assert len(error.splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


def test_the_tool_asks_for_the_names_of_torchvisions_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(randomize(Beside('predictor')).state_dict(), tmp_path / 'old.pth')
    files = (tmp_path / 'old.pth', tmp_path / 'new.pth')
    for wrong in (('torchvision', *files), ('mmcv', *files, '--names', 'conv', 'predictor')):
        with pytest.raises(SystemExit):
            convert(monkeypatch, *wrong)
    assert convert(monkeypatch, 'torchvision', *files, '--names', 'conv', 'predictor') == 0
    assert 'conv.conv_offset.bias' in torch.load(files[1], weights_only=True)['state_dict']


class Unwritable:
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize('there', [b'an older checkpoint', None], ids=['over an older one', 'anew'])
def test_an_interrupted_write_leaves_what_was_there(there: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / 'out.pth'
    if there:
        path.write_bytes(there)
    with pytest.raises(KeyboardInterrupt):
        TOOL['save'](dict(state_dict=dict(a=torch.ones(99), b=Unwritable())), path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == ({path: there} if there else {})
