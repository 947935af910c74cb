# SPDX-License-Identifier: Apache-2.0
"""The command line of the export tools."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdet.apis import init_detector
from mmengine.config import Config

import mmdcn
from mmdcn.deployment.packages import describe
from mmdcn.engine.launch import LaunchError


def main(description: str | None, export: Callable[..., None], suffix: str) -> None:
    """Parse the command line, and export the detector that it names.

    Args:
        description: The description of the tool, for its help.
        export: `export_onnx` or `export_aoti`.
        suffix: The suffix of the file to write.

    Raises:
        LaunchError: If a file is missing, or the detector cannot be exported.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='the config file')
    parser.add_argument('checkpoint', help='the checkpoint file, or an mmdcn:// address of the model zoo')
    parser.add_argument('--out', type=Path, help=f'the file to write [CONFIG{suffix}]')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), default=(800, 1344),
        help='size of the traced example; the exported detector also takes other sizes [800 1344]',
    )  # fmt: skip
    args = parser.parse_args()
    out = args.out or Path(Path(args.config).stem + suffix)
    if out.suffix != suffix:
        parser.error(f'--out must end with {suffix}, got {out}')
    model, metadata = _load(args.config, args.checkpoint)
    try:
        export(model, out, metadata, size=tuple(args.size))
    except (NotImplementedError, ValueError) as error:
        raise LaunchError(str(error)) from error
    print(f'wrote {out}')


def _load(config: str, checkpoint: str) -> tuple[Any, dict[str, str]]:
    for path in (config, checkpoint):
        if '://' not in path and not Path(path).is_file():
            raise LaunchError(f'{path} does not exist')
    cfg = Config.fromfile(config)
    mmdcn.patch_mmdet()
    model = init_detector(cfg, checkpoint, device='cpu')
    return model, describe(model, cfg)
