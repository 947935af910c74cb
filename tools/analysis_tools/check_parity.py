# SPDX-License-Identifier: Apache-2.0
"""Check that a detector has the same parameters and outputs on mmdcn as on mmcv's operators.

Both models get the same random weights, with which the offsets of every deformable layer are about one pixel. They
compute in double precision: a deep random network magnifies rounding errors a thousand times or more, so rounding in
single precision would hide whether two implementations agree. The exit status is 0 if all configs passed.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import mmcv.ops
import mmengine.registry
import torch
from mmcv import _ext
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmdcn.engine.launch import LaunchError, run

TOLERANCE = 1e-4  # relative to the largest value of an output
LAYERS = (mmcv.ops.DeformConv2d, mmcv.ops.ModulatedDeformConv2d)  # mmdcn's layers derive from these
CALLS = ('DeformConv2dFunction', 'ModulatedDeformConv2dFunction', 'mmdcn::')


class Inputs(NamedTuple):
    """A batch of random images with fixed region proposals; the thresholds of an NMS would magnify differences."""

    images: Tensor  # [B, 3, H, W]
    proposals: Tensor  # [B, N, 4], (x1, y1, x2, y2) in pixels


class Outcome(NamedTuple):
    """A model's deformable layers and its outputs."""

    layers: Counter[str]  # deformable layers by class
    calls: Counter[str]  # deformable operators that ran
    outputs: dict[str, list[Tensor]]  # by part of the detector


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='a config file with layers of mmdcn')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=(96, 128),
        help='size of the random images [96 128]',
    )
    return parser.parse_args()


def draw_inputs(height: int, width: int) -> Inputs:
    corners = torch.rand(2, 5, 2, 2, dtype=torch.float64).sort(dim=2).values
    boxes = (corners * torch.tensor([width, height])).flatten(2)
    return Inputs(torch.randn(2, 3, height, width, dtype=torch.float64), boxes)


def on_mmcv(node: Any) -> Any:
    """Return a copy of a config with mmcv's layers instead of mmdcn's."""
    if isinstance(node, dict):
        return type(node)({key: on_mmcv(value) for key, value in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(map(on_mmcv, node))
    if isinstance(node, str) and node.startswith('mmdcn.'):
        name = node.removeprefix('mmdcn.')
        theirs = mmengine.registry.MODELS.module_dict.get(name)
        return name if theirs and theirs.__module__.startswith('mmcv.ops') else node
    return node


def randomise(model: nn.Module, inputs: Inputs) -> None:
    """Draw weights with which every layer affects the outputs: in a new detector, offsets and some branches are zero.

    Batch normalization gets the statistics of the inputs, so that values are about one. Offsets are about one pixel
    everywhere, and vary by a quarter of that between positions. Larger variations would make the network chaotic.
    """
    for name, parameter in model.named_parameters():
        predicts_offsets = 'conv_offset' in name
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter).mul_(0.25 if predicts_offsets else 1)
        elif name.endswith('bias'):
            nn.init.normal_(parameter, std=1 if predicts_offsets else 0.1)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    dict(outputs(model, inputs))
    model.eval()


def outputs(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Any]]:
    """Yield the raw outputs of a detector, part by part."""
    features = model.extract_feat(inputs.images)
    yield 'features', features
    for name in ('rpn_head', 'bbox_head', 'mask_head'):
        head = getattr(model, name, None)
        if head is not None:
            yield name, head(features)
    if getattr(model, 'roi_head', None) is not None:
        samples = [DetDataSample(metainfo=dict(img_shape=image.shape[1:])) for image in inputs.images]
        proposals = [InstanceData(bboxes=boxes) for boxes in inputs.proposals]
        yield 'roi_head', model.roi_head(features, proposals, samples)


def tensors(output: Any) -> list[Tensor]:
    """Flatten an output of nested sequences and dictionaries."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    return [tensor for inner in output for tensor in tensors(inner)]


def evaluate(model: nn.Module, inputs: Inputs) -> Outcome:
    """Run a model, and record which deformable operators ran."""
    with torch.profiler.profile() as profile:
        found = {part: tensors(value) for part, value in outputs(model, inputs)}
    layers = (type(module) for module in model.modules() if isinstance(module, LAYERS))
    return Outcome(
        layers=Counter(f'{layer.__module__}.{layer.__name__}' for layer in layers),
        calls=Counter({event.key: event.count for event in profile.key_averages() if event.key.startswith(CALLS)}),
        outputs=found,
    )


def describe(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def require_equal_parameters(theirs: nn.Module, ours: nn.Module) -> None:
    expected, got = describe(theirs), describe(ours)
    lines = [
        f'{name}: {expected.get(name, "nothing")} on mmcv, {got.get(name, "nothing")} on mmdcn'
        for name in sorted(expected | got)
        if expected.get(name) != got.get(name)
    ]
    if lines:
        raise LaunchError('\n  '.join([f'{len(lines)} parameters and buffers differ:', *lines[:10]]))


def require_own_operators(theirs: Outcome, ours: Outcome) -> None:
    """Refuse a comparison in which a model ran the other's operators, or none."""
    on_mmdcn = {key: key.startswith('mmdcn::') for key in theirs.calls | ours.calls}
    if any(on_mmdcn[key] for key in theirs.calls) or not all(on_mmdcn[key] for key in ours.calls):
        raise LaunchError(
            f'the model on mmcv ran {dict(theirs.calls)}, the one on mmdcn {dict(ours.calls)}: each should run its own '
            'operators. For a part that imports mmcv.ops itself, set '
            "custom_imports = dict(imports=['mmdcn.overrides_everywhere']) in the config"
        )
    if not ours.calls or theirs.calls.total() != ours.calls.total():
        raise LaunchError(
            f'the model on mmcv ran {theirs.calls.total()} deformable operators, the one on mmdcn '
            f'{ours.calls.total()}: the numbers should be equal, and at least one'
        )


def compare(theirs: list[Tensor], ours: list[Tensor]) -> tuple[float, float]:
    """Return the largest difference of two outputs, and the largest one relative to the output's largest value."""
    absolute = [(got - expected).abs().max() for got, expected in zip(ours, theirs, strict=True)]
    sizes = [expected.abs().max().clamp(min=1e-30) for expected in theirs]
    relative = [difference / size for difference, size in zip(absolute, sizes, strict=True)]
    # torch's max keeps a NaN; Python's may drop it.
    return float(torch.stack(absolute).max()), float(torch.stack(relative).max())


def check(config: str, shape: tuple[int, int]) -> None:
    if not Path(config).is_file():
        raise LaunchError(f'config {config} does not exist')
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # silences the profiler's log
    torch.manual_seed(0)
    cfg = Config.fromfile(config, import_custom_modules=False)
    inputs = draw_inputs(*shape)
    on_theirs = MODELS.build(on_mmcv(cfg.model)).double()
    randomise(on_theirs, inputs)
    theirs = evaluate(on_theirs, inputs)

    # After this import, a part of either model that uses mmcv.ops directly may run on mmdcn.
    if 'custom_imports' in cfg:
        import_modules_from_strings(**cfg.custom_imports)
    on_ours = MODELS.build(cfg.model).double().eval()
    require_equal_parameters(on_theirs, on_ours)
    on_ours.load_state_dict(on_theirs.state_dict())
    ours = evaluate(on_ours, inputs)
    report(config, len(on_theirs.state_dict()), theirs, ours)


def report(config: str, count: int, theirs: Outcome, ours: Outcome) -> None:
    """Print the comparison so that it can be pasted into a page."""
    console = Console(width=140)
    console.print(f'\n{Path(config).stem}: the same {count} parameters and buffers in both')
    made_of = Table('model', 'deformable layers', 'deformable operators that ran', box=box.MARKDOWN)
    for name, outcome in (('on mmcv', theirs), ('on mmdcn', ours)):
        made_of.add_row(
            name, *(', '.join(f'{n} {key}' for key, n in c.items()) for c in (outcome.layers, outcome.calls))
        )
    console.print(made_of)
    require_own_operators(theirs, ours)
    table = Table('part', 'largest difference', 'relative', 'ok', box=box.MARKDOWN)
    passed = True
    for part, expected in theirs.outputs.items():
        absolute, relative = compare(expected, ours.outputs[part])
        passed &= relative <= TOLERANCE
        table.add_row(part, f'{absolute:.1e}', f'{relative:.1e}', 'yes' if relative <= TOLERANCE else 'NO')
    console.print(table)
    if not passed:
        raise LaunchError(f'{config}: outputs differ by more than {TOLERANCE} of the largest value')


def main() -> None:
    args = parse_args()
    if _ext.__file__.endswith('.py'):
        raise LaunchError(
            "mmcv runs on mmdcn's operators here, so there is nothing to compare with: `make test-mmcv` compiles "
            "mmcv's into .venv-mmcv, and .venv-mmcv/bin/python runs this tool on them"
        )
    register_all_modules()
    failed = []
    for config in args.configs:
        # Each config runs in its own process: its imports may change mmdet for later configs.
        process = get_context('fork').Process(target=lambda c=config: sys.exit(run(partial(check, c, args.shape))))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(config)
    if failed:
        raise LaunchError(f'no parity: {", ".join(failed)}')


if __name__ == '__main__':
    with torch.no_grad():
        sys.exit(run(main))
