# SPDX-License-Identifier: Apache-2.0
"""Make of a training's checkpoint one to publish: the weights alone, named after their sha256."""

import argparse
import hashlib
import io
import os
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from convert_checkpoint import build_model, print_table
from mmengine.config import Config
from torch import Tensor

from mmdcn import zoo
from mmdcn.checkpoints.safe_globals import load_training
from mmdcn.engine.launch import LaunchError, run
from mmdcn.version import __version__


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path, help='the config file; the model gets its name')
    parser.add_argument('checkpoint', type=Path, help="the training's checkpoint file")
    parser.add_argument('--half', action='store_true', help='store float16; what loads it computes in float32 again')
    parser.add_argument('--out-dir', type=Path, help='the folder to write into [that of the config]')
    return parser.parse_args()


def load(path: Path) -> dict:
    try:
        checkpoint = load_training(path)
        return {'state_dict': checkpoint['state_dict'], 'classes': checkpoint['meta']['dataset_meta']['classes']}
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise LaunchError(f'{path} is no checkpoint of a training by MMEngine: {error}') from error


def check(state_dict: dict[str, Tensor], config: Path) -> None:
    """Check that the weights are those of the config's model, and numbers."""
    expected = {key: tuple(value.shape) for key, value in build_model(str(config)).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state_dict.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise LaunchError(
                f'the checkpoint is not of {config}: {key} is {found.get(key, "missing")} in it and '
                f'{expected.get(key, "missing")} in the model; give the config that it was trained with'
            )
    for key, value in state_dict.items():
        if not value.isfinite().all():
            raise LaunchError(f'{key} has values that are infinite or NaN; if it had none, publish without --half')


def main() -> None:
    args = parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            raise LaunchError(f'{path} does not exist')
    trained = load(args.checkpoint)
    weights = trained['state_dict']  # with an EMAHook, the averages: it swaps them with the others as it saves
    for key, value in weights.items():
        if args.half and value.is_floating_point():
            weights[key] = value.half()
    check(weights, args.config)
    meta = dict(
        dataset_meta=dict(classes=trained['classes']),
        cfg=Config.fromfile(args.config).pretty_text,
        mmdcn_version=__version__,
    )
    # A file's name would become part of its bytes, and so of the hash.
    buffer = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    out = (args.out_dir or args.config.parent) / f'{args.config.stem}-{sha256[:8]}.pth'
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f'{out.name}.{os.getpid()}.tmp')
    try:
        beside.write_bytes(buffer.getvalue())
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    sizes = (f'{path.stat().st_size / 2**20:.2f} MiB' for path in (args.checkpoint, out))
    print_table(('published', str(out)), zip(('size before', 'size', 'sha256'), (*sizes, sha256), strict=True))
    print(
        'For the metafile, with the figures that tools/test.py gives:\n\n'
        f'- Name: {args.config.stem}\n'
        f'  Config: configs/{args.config.resolve().parent.name}/{args.config.name}\n'
        f'  Weights: {zoo.ADDRESS}{out.name}\n'
        f'  SHA256: {sha256}'
    )


if __name__ == '__main__':
    sys.exit(run(main))
