# SPDX-License-Identifier: Apache-2.0
"""What a tool needs to run a detector: a checkpoint, found by its name and refused if it does not fit, and a device."""

from pathlib import Path

import torch
from mmdet.apis import init_detector
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdcn.checkpoints import accept_version1_keys, zoo
from mmdcn.engine.launch import LaunchError, explained, read_config


def find_checkpoint(name: str) -> str:
    """Return the path or the address of a checkpoint, which may also be named as in the model zoo.

    Raises:
        LaunchError: If there is no such file and no such model.
    """
    if Path(name).exists() or '://' in name:
        return name
    try:
        return zoo.find(name).weights
    except zoo.ZooError as error:
        raise LaunchError(f'checkpoint {name} does not exist, and {error}; tools/train.py makes one') from error


def check_fits(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint, and check that it has every parameter of the model; mmengine only logs what is missing.

    The model may be wrapped, for a distributed run or for test-time augmentation.

    Raises:
        LaunchError: If the shape of a tensor differs, or a parameter is missing.
    """
    while isinstance(module := getattr(model, 'module', None), nn.Module):
        model = module
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    state = {key.removeprefix('module.'): value for key, value in loaded.get('state_dict', loaded).items()}
    accept_version1_keys(model)
    try:
        missing = set(model.load_state_dict(state, strict=False).missing_keys)
    except RuntimeError as error:  # torch names every tensor whose shape differs, one a line
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
    else:
        reasons = [f'{key} is missing' for key, _ in model.named_parameters() if key in missing]
    if reasons:
        more = f'; and {len(reasons) - 3} more' if len(reasons) > 3 else ''
        raise LaunchError(f'{checkpoint} does not fit the config: {"; ".join(reasons[:3])}{more}')


def check_resumable(checkpoint: str) -> None:
    """Check that a training can be resumed from a checkpoint.

    Raises:
        LaunchError: If it holds weights alone, as published ones do.
    """
    if 'optimizer' not in CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu'):
        raise LaunchError(
            f'{checkpoint} holds no state of an optimizer, so no training can be resumed from it; start a new one from '
            f'its weights with --cfg-options load_from={checkpoint}'
        )


def check_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        LaunchError: If it cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of a name, of a build, of a backend
        reason = str(error).partition('. ')[0].splitlines()[0]
        raise LaunchError(f'--device must be a device that torch can use, got {device}: {reason}') from error


def load_detector(config: str, checkpoint: str, device: str = 'cpu') -> nn.Module:
    """Build the detector of a config file, and load a checkpoint.

    Args:
        config: The path of the config.
        checkpoint: The path or the address of the checkpoint, or its name in the model zoo.
        device: Where the detector runs.

    Raises:
        LaunchError: If a file is missing, or the checkpoint does not fit, or torch cannot use the device.
    """
    check_device(device)
    checkpoint = find_checkpoint(checkpoint)
    cfg = read_config(config)
    with explained(cfg):
        model = init_detector(cfg, checkpoint, device=device)
        check_fits(model, checkpoint)
    return model
