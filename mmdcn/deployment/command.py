# SPDX-License-Identifier: Apache-2.0
"""The command line of the export tools."""

import argparse
from collections.abc import Callable
from pathlib import Path

import mmdcn
from mmdcn.deployment.packages import describe
from mmdcn.engine.launch import LaunchError
from mmdcn.engine.loading import load_detector


def main(description: str | None, export: Callable[..., None], suffix: str) -> None:
    """Parse the command line, and export the detector that it names.

    Args:
        description: The description of the tool, for its help.
        export: `export_onnx` or `export_aoti`.
        suffix: The suffix of the file to write.

    Raises:
        LaunchError: If a file is missing, the checkpoint does not fit, or the detector cannot be exported.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='the config file')
    parser.add_argument('checkpoint', help='the checkpoint file, or a name of the model zoo')
    parser.add_argument('--out', type=Path, help=f'the file to write [CONFIG{suffix}]')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), default=(800, 1344),
        help='size of the traced example; the exported detector also takes other sizes [800 1344]',
    )  # fmt: skip
    args = parser.parse_args()
    out = args.out or Path(Path(args.config).stem + suffix)
    if out.suffix != suffix:
        parser.error(f'--out must end with {suffix}, got {out}')
    mmdcn.patch_mmdet()
    model = load_detector(args.config, args.checkpoint)
    print(f'exporting {args.config}, which takes a minute or more', flush=True)
    try:
        export(model, out, describe(model, model.cfg), size=tuple(args.size))
    except (NotImplementedError, ValueError) as error:
        raise LaunchError(str(error)) from error
    print(f'wrote {out}')
