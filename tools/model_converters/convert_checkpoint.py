# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of another implementation of deformable convolution to mmdcn's layers."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdcn.checkpoints import SOURCES, Conversion, Source, check_target, convert_state_dict
from mmdcn.checkpoints.safe_globals import NUMPY
from mmdcn.engine.launch import LaunchError, build_model, run
from mmdcn.utils.files import replacing
from mmdcn.utils.tables import print_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', choices=[*SOURCES, 'torchvision'], help='where the checkpoint comes from')
    parser.add_argument('checkpoint', type=Path, help='the checkpoint file')
    parser.add_argument('out', type=Path, help='the file to write')
    parser.add_argument(
        '--config', help='the config of the model that will load it; the weights are checked against this model'
    )
    parser.add_argument(
        '--names',
        nargs='+',
        default=[],
        metavar='NAME',
        help="for torchvision: the model's names for its DeformConv2d, for the convolution that predicts the offsets, "
        'and for the one that predicts the masks, if separate',
    )
    args = parser.parse_args()
    if len(args.names) not in ((2, 3) if args.source == 'torchvision' else (0,)):
        parser.error('torchvision needs --names with two or three names; other sources take none')
    return args


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Load the weights and metadata of a checkpoint, and unpickle nothing else."""
    if path.suffix == '.pkl':
        raise LaunchError(
            f'{path} is a pickle, which can run any code when it is loaded. If you trust it, convert it: '
            f"torch.save(pickle.load(open('{path}', 'rb'), encoding='latin1'), '{path.with_suffix('.pth')}')"
        )
    try:
        with torch.serialization.safe_globals(NUMPY):  # detectron2's weights may be NumPy arrays
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise LaunchError(f'{path} cannot be read: {error.strerror}') from error
    except (UnpicklingError, RuntimeError, EOFError) as error:
        other = re.search(r'GLOBAL (\S+) was not an allowed', str(error))
        reason = f"contains {other[1]}; save only its 'state_dict'" if other else 'is incomplete'
        raise LaunchError(f'{path} is not a file of weights, or {reason}') from error
    weights = next((checkpoint[key] for key in ('state_dict', 'model') if key in checkpoint), checkpoint)
    tensors = {
        key.removeprefix('module.'): torch.as_tensor(value)
        for key, value in weights.items()
        if isinstance(value, Tensor | np.ndarray)
    }
    if not tensors:
        raise LaunchError(f'{path} has no weights at the top level, in state_dict or in model')
    return tensors, checkpoint.get('meta', {})


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the complete file, or no file at all."""
    with replacing(path) as beside:
        torch.save(checkpoint, beside)


def print_changes(conversion: Conversion) -> None:
    """Print how the keys changed; keys that differ only in numbers share a row."""
    rows: dict[tuple[str, str], list[Tensor]] = {}
    for name, keys in conversion.origins.items():
        if keys != (name,):
            before, after = (re.sub(r'\d+', '#', text) for text in (' + '.join(keys) or 'zeros', name))
            rows.setdefault((before, after), []).append(conversion.state_dict[name])
    print_table(
        ('key before', 'key after', 'keys', 'shape of the first'),
        [(*names, str(len(tensors)), str([*tensors[0].shape])) for names, tensors in rows.items()],
    )
    unchanged = sum(keys == (name,) for name, keys in conversion.origins.items())
    print(f'{unchanged} other keys are unchanged')


def print_keys(title: str, keys: Iterable[str]) -> None:
    """Print the number of keys of each kind, if there are any."""
    kinds = Counter(re.sub(r'\d+', '#', key) for key in sorted(keys))
    if kinds:
        print_table((title, 'keys'), [(kind, str(count)) for kind, count in kinds.items()])


def main() -> None:
    args = parse_args()
    source = Source.torchvision(*args.names) if args.names else SOURCES[args.source]
    weights, meta = load(args.checkpoint)
    try:
        conversion = convert_state_dict(weights, source)
        if args.config:
            model = build_model(args.config)
            # Weights of only a backbone are for the backbone's init_cfg.
            if not any(key.startswith('backbone.') for key in conversion.state_dict):
                model = model.backbone
            check_target(conversion.state_dict, model, source)
    except ValueError as error:
        raise LaunchError(f'{args.checkpoint}: {error}') from error
    print_changes(conversion)
    print_keys('left out', weights.keys() - {key for keys in conversion.origins.values() for key in keys})
    if args.config:
        places = model.state_dict().keys()
        print_keys('not in the model', conversion.state_dict.keys() - places)
        missing = places - conversion.state_dict.keys()
        print_keys('missing in the checkpoint', (key for key in missing if not key.endswith('.num_batches_tracked')))
    else:
        print('without --config, shapes, paddings and dilations were not compared with a model')
    save(dict(meta=meta, state_dict=conversion.state_dict), args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    sys.exit(run(main))
