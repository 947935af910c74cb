# SPDX-License-Identifier: Apache-2.0
"""An mmdcn whose zoo has one small model, and a server of checkpoints."""

import os
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import yaml

import mmdcn

ROOT = Path(__file__).parents[1]
CONFIG = """
_base_ = 'mmdcn::mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
custom_hooks = [dict(type='EMAHook', momentum=0.5)]
train_cfg = dict(max_epochs=1)
train_dataloader = dict(batch_size=1, dataset=dict(data_root={data!r}))
val_dataloader = dict(dataset=dict(data_root={data!r}))
test_dataloader = dict(dataset=dict(data_root={data!r}))
val_evaluator = dict(ann_file={data!r} + 'annotations/test.json')
test_evaluator = val_evaluator
"""


class Package:
    """An mmdcn whose zoo has one small model, `tiny`, and a folder for what its runs write."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.mim = folder / 'mmdcn/.mim'
        self.config = self.mim / 'configs/tiny/tiny.py'
        self.config.parent.mkdir(parents=True)
        source = Path(mmdcn.__file__).parent
        self.link(source, folder / 'mmdcn')
        self.link(ROOT / 'configs', self.mim / 'configs')
        self.config.write_text(CONFIG.format(data=f'{data}/'))
        self.list_models()

    @staticmethod
    def link(source: Path, target: Path) -> None:
        for path in source.iterdir():
            if path.name not in ('.mim', '__pycache__'):
                (target / path.name).symlink_to(path)

    def list_models(self, *models: dict) -> None:
        self.config.with_name('metafile.yml').write_text(yaml.safe_dump({'Models': list(models)}))
        (self.mim / 'model-index.yml').write_text(yaml.safe_dump({'Import': ['configs/tiny/metafile.yml']}))

    def call(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        env = os.environ | {'PYTHONPATH': str(self.folder), 'TORCH_HOME': str(self.folder / 'cache')} | environment
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=env, check=False)

    def run(self, *arguments: object) -> str:
        result = self.call(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; of what lies under /cut/, the first half."""

    def do_GET(self) -> None:
        cut = self.path.startswith('/cut/')
        content = Path(self.directory, Path(self.path).name).read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *_: object) -> None:
        pass
