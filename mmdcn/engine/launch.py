# SPDX-License-Identifier: Apache-2.0
"""The way from a command line to a runner, with a message for every error that a user can fix."""

import argparse
import ast
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from traceback import walk_tb
from typing import Any

import mmcv.ops
import torch
from mmdet.registry import MODELS
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS, Registry, init_default_scope, root
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from mmdcn._private_hooks import parse_option
from mmdcn.checkpoints import accept_version1_keys
from mmdcn.checkpoints.safe_globals import allow_mmengine_checkpoints
from mmdcn.checkpoints.zoo import ZooError
from mmdcn.datasets import ImageError
from mmdcn.utils.files import replacing

_CONVERTERS = {
    'mnist_scenes': 'python tools/dataset_converters/mnist_scenes.py',
    'neon_trees': 'python tools/dataset_converters/neon_trees.py',
    'coco_tiny': 'python tools/dataset_converters/coco_tiny.py',
    'coco': 'mim download mmdet --dataset coco2017',
}
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EISDIR, errno.ENOTDIR)
_ROOTS = [registry for registry in vars(root).values() if isinstance(registry, Registry)]


class LaunchError(Exception):
    """An error that a user can fix; the message says how."""


class Options(argparse.Action):
    """mmengine's DictAction, which also takes dicts: `KEY=[dict(type="EMAHook")]`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Add the settings to those given before."""
        options = dict(getattr(namespace, self.dest) or {})
        for setting in values:
            key, separator, text = setting.partition('=')
            if not separator:
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, got {setting!r}')
            try:
                options[key] = _parse_value(text)
            except (ValueError, SyntaxError, RecursionError, AssertionError) as error:  # mmengine raises the last two
                raise argparse.ArgumentError(
                    self,
                    f'{key} must be a number, a word, or a list, tuple or dict of these, as in Python, got {text!r}',
                ) from error
        setattr(namespace, self.dest, options)


def _parse_value(text: str) -> Any:
    if 'dict(' not in text and '{' not in text:
        return parse_option(text)
    return _value_of(ast.parse(text.strip(), mode='eval').body)


def _value_of(node: ast.expr) -> Any:
    """Return the value of an expression; a word needs no quotes, as in every option."""
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords) if all(one.arg for one in keywords):
            return {one.arg: _value_of(one.value) for one in keywords}
        case ast.Dict(keys=keys, values=values) if all(keys):
            return {_value_of(key): _value_of(value) for key, value in zip(keys, values, strict=True) if key}
        case ast.List(elts=elements):
            return [_value_of(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value_of(element) for element in elements)
        case ast.Name() | ast.Attribute():
            return ast.unparse(node)
    return ast.literal_eval(node)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share; they are the same as in mmdet's tools."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints [work_dirs/CONFIG]')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help="settings that replace the config's, such as train_dataloader.batch_size=2, 'key=[(a,b),(c,d)]' or "
        '\'custom_hooks=[dict(type="EMAHook")]\'',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def read_config(path: str | Path) -> Config:
    """Read the config of a model.

    Raises:
        LaunchError: If the file is missing or cannot be read, or has no model.
    """
    if not Path(path).is_file():
        raise LaunchError(f'config {path} does not exist; `ls configs/*` lists those of mmdcn')
    try:
        cfg = Config.fromfile(path)
    except (OSError, SyntaxError) as error:  # of a base, for example
        raise LaunchError(f'config {path} cannot be read: {error}') from error
    if 'model' not in cfg:
        raise LaunchError(f'config {path} must have a model, got {", ".join(cfg) or "nothing"}')
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that a command line names, with its options merged in.

    Raises:
        LaunchError: If the file is missing or cannot be read, or has no model.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
        if 'custom_imports' in cfg:  # fromfile has imported only those of the file
            import_modules_from_strings(**cfg.custom_imports)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def build_runner(cfg: Config, *loops: str) -> Runner:
    """Check that the data exists, and build the runner of a config.

    Args:
        cfg: The config.
        loops: The data loaders that the run will use: `train`, `val`, `test`.

    Raises:
        LaunchError: If a file or a folder of the data is missing.
    """
    check_data(cfg, *loops)
    # torch.compile recompiles for each image shape, and would otherwise reach torch's default limit.
    setup_cache_size_limit_of_dynamo()
    if get_device() == 'cpu':
        _use_amp_of_cpu(cfg)
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _distribute_on_cpu(cfg)
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    if isinstance(runner.model, torch.nn.Module):  # a FlexibleRunner builds its model later
        accept_version1_keys(runner.model)
    return runner


def check_data(cfg: Config, *loops: str) -> None:
    """Check that the data of a config exists.

    Args:
        cfg: The config.
        loops: The data loaders to check: `train`, `val`, `test`.

    Raises:
        LaunchError: If a file or a folder is missing; the message names it and, if known, the command that makes it.
    """
    for loop in loops:
        for dataset in _datasets(cfg.get(f'{loop}_dataloader', {}).get('dataset')):
            _check_dataset(dataset, f'{loop}_dataloader')


def build_model(config: str | Path) -> torch.nn.Module:
    """Build the model of a config file.

    Raises:
        LaunchError: If the config cannot be read, or has an error that `explained` explains, such as an unknown type.
    """
    cfg = read_config(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    with explained(cfg):
        return MODELS.build(cfg.model)


@contextmanager
def explained(cfg: Config) -> Iterator[None]:
    """Replace an error that a user can fix by one that names its cause, where possible with the config key.

    Such errors are a `type` that is not registered, a missing file, weights that need torchvision, and a checkpoint
    that contains more than data.

    Raises:
        LaunchError: Instead of such an error. All other errors keep their traceback.
    """
    try:
        yield
    except FileNotFoundError as error:
        name = error.filename or str(error).removesuffix(' can not be found.')  # mmengine's wording
        places = [place for place, text in _texts(dict(cfg.items()), '') if text == str(name)]
        if not places:
            raise
        raise LaunchError(f'{" and ".join(places)}: {name} does not exist') from error
    except ModuleNotFoundError as error:
        weights = [
            text for _, text in _texts(dict(cfg.items()), '') if text.startswith(('torchvision://', 'modelzoo://'))
        ]
        if error.name != 'torchvision' or not weights:
            raise
        place = next(place for place, text in _texts(dict(cfg.items()), '') if text == weights[0])
        raise LaunchError(
            f'{place}: {weights[0]} needs torchvision, which is not installed: `pip install torchvision`, or name a '
            f'checkpoint file there, or train from scratch with {place.removesuffix(".checkpoint")}=None'
        ) from error
    except UnpicklingError as error:
        found = re.search(r'GLOBAL (\S+)', str(error))
        what = found[1] if found else 'something other than tensors'
        raise LaunchError(
            f'the checkpoint named above holds {what}, and might run code when it is loaded. If you trust its source, '
            "keep only its weights: torch.save({'state_dict': torch.load(OLD, weights_only=False)['state_dict']}, NEW)"
        ) from error
    except KeyError as error:
        scope = cfg.get('default_scope', 'mmengine')
        unknown = [_describe(place, name) for place, name in _unknown_types(cfg, scope)]
        if not unknown:
            raise
        raise LaunchError(
            '; '.join(unknown) + '. Correct it, or name the module that registers it in custom_imports'
        ) from error


def mend_last_checkpoint(work_dir: Path) -> None:
    """Restore the file `last_checkpoint` if a killed run has left it empty, or if its folder was moved.

    mmengine rewrites it in place, after the checkpoint that it names; so the newest checkpoint is complete.
    """
    note = work_dir / 'last_checkpoint'
    if not note.exists():
        return
    named = Path(note.read_text())
    if not named.exists() and (work_dir / named.name).is_file():
        with replacing(note) as beside:
            beside.write_text(str(work_dir / named.name))
    elif not named.name:
        checkpoints = [path for path in work_dir.glob('*.pth') if not path.name.startswith('best_')]
        if not checkpoints:
            raise LaunchError(f'{note} is empty, and no checkpoint is beside it: delete it to train from the start')
        with replacing(note) as beside:
            beside.write_text(str(max(checkpoints, key=lambda path: path.stat().st_mtime)))


def run(main: Callable[[], None]) -> int:
    """Run a tool, and print an error that a user can fix as one line instead of a traceback."""
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'  # else onedl-mmengine retries with weights_only=False
    allow_mmengine_checkpoints()
    try:
        main()
    except (LaunchError, ZooError, ImageError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        return 130  # of a shell
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        print(f'error: {reason}', file=sys.stderr)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else its threads may abort the process at its end
    return 0


def _reason(error: Exception) -> str | None:
    """Return what a user can do about a file that cannot be written or a checkpoint that cannot be loaded."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return f'{error.filename2 or error.filename} cannot be written: {error.strerror}. Name another place'
    calls = {(frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in walk_tb(error.__traceback__)}
    if (torch.serialization.__file__, 'load') in calls:
        return 'the checkpoint named above is incomplete, or not one of torch: copy or download it again'
    if isinstance(error, FileNotFoundError) and str(error).endswith(' can not be found.'):  # mmengine's wording
        return f'{str(error).removesuffix(" can not be found.")} does not exist'
    return None


def _use_amp_of_cpu(cfg: Config) -> None:
    """Replace mmengine's AmpOptimWrapper, which refuses a CPU, by mmdcn's."""
    wrapper = cfg.get('optim_wrapper') or {}
    if str(getattr(wrapper.get('type'), '__name__', wrapper.get('type'))).split('.')[-1] == 'AmpOptimWrapper':
        wrapper['type'] = 'mmdcn.AmpOptimWrapper'


def _distribute_on_cpu(cfg: Config) -> None:
    """Start gloo, and keep mmengine from assigning a GPU to each process."""
    torch.distributed.init_process_group('gloo')
    default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg', default), device_ids=None)


def _datasets(dataset: ConfigDict | None) -> Iterator[ConfigDict]:
    """Yield the datasets that read files, also those inside wrappers such as RepeatDataset and ConcatDataset."""
    if dataset is None:
        return
    inner = [dataset['dataset']] if 'dataset' in dataset else dataset.get('datasets', [])
    for wrapped in inner:
        yield from _datasets(wrapped)
    if not inner:
        yield dataset


def _check_dataset(dataset: ConfigDict, loader: str) -> None:
    data_root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or {}
    wanted = {
        'ann_file': dataset.get('ann_file'),
        **{f'data_prefix.{key}': prefix[key] for key in prefix},
    }
    for key, name in wanted.items():
        if not name or '://' in f'{data_root}{name}':
            continue
        path = Path(data_root, name)
        if not path.exists():
            hint = next((how for what, how in _CONVERTERS.items() if what in path.as_posix()), None)
            raise LaunchError(
                f'{loader}.dataset.{key}: {path} does not exist. '
                + (f'Get it with `{hint}`, or set' if hint else 'Set')
                + f' {loader}.dataset.data_root and {key} to where it is'
            )


def _unknown_types(cfg: Config, scope: str) -> Iterator[tuple[str, str]]:
    """Yield the config key and the name of every `type` that neither a registry nor mmcv.ops has."""
    for place, name in _types(dict(cfg.items()), ''):
        full_name = name if '.' in name else f'{scope}.{name}'
        if not any(registry.get(full_name) for registry in _ROOTS) and not hasattr(mmcv.ops, name):
            yield place, name


def _types(node: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield the config key and the name of every `type`."""
    return ((where, text) for where, text in _texts(node, place) if where.split('.')[-1] == 'type')


def _texts(node: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield every string of a config with its key, such as `model.neck[0].type`."""
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f'{place}.{key}' if place else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _texts(value, f'{place}[{index}]')


def _describe(place: str, name: str) -> str:
    registries = [registry for top in _ROOTS for registry in (top, *top.children.values())]
    known = {key for registry in registries for key in registry.module_dict}
    close = difflib.get_close_matches(name.split('.')[-1], known, n=3)
    hint = f' (did you mean {" or ".join(map(repr, close))}?)' if close else ''
    return f'{place}: {name!r} is not registered{hint}'
