# SPDX-License-Identifier: Apache-2.0
"""Convert a training checkpoint for publication: only the weights, in a file named after its sha256."""

import argparse
import sys
from pathlib import Path

from mmdcn import zoo
from mmdcn.checkpoints.publishing import publish
from mmdcn.engine.launch import LaunchError, run
from mmdcn.utils.tables import print_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path, help='the config file; the model gets its name')
    parser.add_argument('checkpoint', type=Path, help='the checkpoint file of the training')
    parser.add_argument('--half', action='store_true', help='store float16; a model that loads it computes in float32')
    parser.add_argument('--out-dir', type=Path, help='the folder to write into [that of the config]')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            raise LaunchError(f'{path} does not exist')
    published = publish(args.config, args.checkpoint, args.out_dir or args.config.parent, args.half)
    sizes = (f'{path.stat().st_size / 2**20:.2f} MiB' for path in (args.checkpoint, published.path))
    rows = zip(('size before', 'size', 'sha256'), (*sizes, published.sha256), strict=True)
    print_table(('published', str(published.path)), rows)
    print(
        'For the metafile, with the metrics that tools/test.py prints:\n\n'
        f'- Name: {args.config.stem}\n'
        f'  Config: configs/{args.config.resolve().parent.name}/{args.config.name}\n'
        f'  Weights: {zoo.ADDRESS}{published.path.name}\n'
        f'  SHA256: {published.sha256}'
    )


if __name__ == '__main__':
    sys.exit(run(main))
