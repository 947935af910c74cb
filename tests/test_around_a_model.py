# SPDX-License-Identifier: Apache-2.0
"""What people do with a whole detector works with deformable layers in it."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.dataset import pseudo_collate
from mmengine.model import ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.runner import Runner
from small_detectors import batch, build, faster_rcnn_config, fcos_config
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack

LAYERS = ['mmdcn.DCN', 'mmdcn.DCNv2']
CONFIGS = [fcos_config, faster_rcnn_config]


def detector(config: Callable = fcos_config, **settings: Any) -> nn.Module:
    """Build a detector, and move its offsets away from zero."""
    model = build(config(**settings))
    for layer in deformable(model):
        nn.init.normal_(layer.conv_offset.weight, std=0.05)
    return model


def deformable(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, DeformConv2dPack | ModulatedDeformConv2dPack)]


def loss(model: nn.Module) -> Tensor:
    torch.manual_seed(0)  # two stages draw samples
    return model.parse_losses(model(**model.data_preprocessor(batch(), True), mode='loss'))[0]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def features(model: nn.Module, **to: Any) -> tuple[Tensor, ...]:
    x = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    return model.eval().extract_feat(x.to(**to))


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 0) -> None:
    """Compare, with a tolerance relative to the largest value."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
@pytest.mark.parametrize('layer', LAYERS)
def test_normalization_is_converted_to_that_of_many_processes_and_back(layer: str, convert: Callable) -> None:
    model = detector(layer=layer)
    expected, layers, names = features(model), deformable(model), list(model.state_dict())
    model = convert(model)
    assert isinstance(model.backbone.layer2[0].bn2, nn.SyncBatchNorm)
    assert deformable(model) == layers
    model = revert_sync_batchnorm(model)
    assert not isinstance(model.backbone.layer2[0].bn2, nn.SyncBatchNorm)
    assert deformable(model) == layers
    assert list(model.state_dict()) == names
    assert_equal(features(model), expected)


@pytest.mark.parametrize('config', CONFIGS)
def test_checkpointing_gives_the_same_gradients(config: Callable) -> None:
    plain, checkpointed = (detector(config, with_cp=with_cp) for with_cp in (False, True))
    expected, got = gradients(plain), gradients(checkpointed)
    # The same sums in another order, through 8 layers.
    assert_equal(tuple(got.values()), tuple(expected.values()), 1e-3)
    assert all(expected[name].abs().max() > 0 for name in expected if 'conv_offset.weight' in name)


@pytest.mark.parametrize('layer', LAYERS)
def test_an_average_of_weights_averages_those_of_the_layers(layer: str) -> None:
    model = detector(layer=layer)
    average = ExponentialMovingAverage(model, momentum=0.25)
    states = []
    for _ in range(2):  # the first one is copied
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        average.update_parameters(model)
        states.append(deepcopy(model.state_dict()))
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, 0.75 * states[0][name] + 0.25 * states[1][name])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('layer', LAYERS)
def test_mixed_precision_trains(device: str, layer: str, dtype: torch.dtype) -> None:
    model = detector(layer=layer).to(device)
    expected = loss(model).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.autocast(device, dtype):
        first = loss(model)
    first.backward()
    optimizer.step()
    # A bfloat16 has 8 bits: of a loss, which is a mean over many places, that is good for a few percent.
    assert first.item() == pytest.approx(expected, rel=0.05)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for each in deformable(model):
        assert each.conv_offset.weight.grad.abs().max() > 0
    assert loss(model).item() < expected


class Recorder:
    """A backend of torch.compile that runs each graph as it is, and remembers it."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        self.graphs.append(module.graph)
        return module.forward

    def calls(self) -> list[int]:
        """Count the calls of the operator in each graph that has some."""
        operator = torch.ops.mmdcn.deform_conv2d
        counts = [sum(node.target in (operator, operator.default) for node in graph.nodes) for graph in self.graphs]
        return [count for count in counts if count > 0]


def train(work_dir: Path, **settings: Any) -> Runner:
    """Train for one iteration on the batch."""
    samples = [dict(inputs=image, data_samples=sample) for image, sample in zip(*batch().values(), strict=True)]
    runner = Runner(
        detector(),
        str(work_dir),
        train_dataloader=DataLoader(samples, batch_size=2, collate_fn=pseudo_collate),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(checkpoint=None),
        experiment_name=work_dir.name,
        cfg=settings,
    )
    runner.train()
    return runner


def test_a_compiled_detector_trains_as_it_does_uncompiled(tmp_path: Path) -> None:
    """All deformable layers are in one graph."""
    recorder = Recorder()
    torch._dynamo.register_backend(recorder, name='recorder')  # a config holds no objects
    compiled = train(tmp_path / 'compiled', compile=dict(backend='recorder')).model
    eager = train(tmp_path / 'eager').model
    assert recorder.calls() == [len(deformable(eager))]
    state, initial = eager.state_dict(), detector().state_dict()
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(state['backbone.layer3.1.conv2.weight'], initial['backbone.layer3.1.conv2.weight'])


@pytest.mark.parametrize('layer', LAYERS)
def test_a_channels_last_detector_gives_the_same_features_without_a_copy(layer: str) -> None:
    model = detector(layer=layer)
    expected = features(model)
    seen: list[Tensor] = []
    for each in deformable(model):
        each.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    got = features(model.to(memory_format=torch.channels_last), memory_format=torch.channels_last)
    # Other kernels add up the products of 8 layers in another order.
    assert_equal(got, expected, 1e-4)
    assert len(seen) == 2 * len(deformable(model))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


def saved_and_loaded(model: nn.Module, path: Path) -> nn.Module:
    torch.save(model.state_dict(), path)
    other = build(
        fcos_config(layer='mmdcn.DCN' if isinstance(deformable(model)[0], DeformConv2dPack) else 'mmdcn.DCNv2')
    )
    other.load_state_dict(torch.load(path, weights_only=True))
    return other


@pytest.mark.parametrize(
    'copy',
    [lambda model, _: deepcopy(model), lambda model, _: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=['deepcopy', 'pickle', 'state_dict'],
)
@pytest.mark.parametrize('layer', LAYERS)
def test_a_copy_gives_the_same_features(layer: str, copy: Callable, tmp_path: Path) -> None:
    model = detector(layer=layer)
    other = copy(model, tmp_path / 'detector.pth')
    assert other is not model
    assert_equal(features(other), features(model))


# float64 has digits to spare; the others round at 2**-11 and 2**-8 in each of 8 layers, whose errors add up.
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-5), (torch.float16, 8 * 2**-10), (torch.bfloat16, 8 * 2**-7)], ids=str
)
@pytest.mark.parametrize('layer', LAYERS)
def test_a_detector_of_another_type_gives_nearly_the_same_features(
    layer: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = detector(layer=layer)
    expected = features(model)
    got = features(model.to(dtype), dtype=dtype)
    assert {feature.dtype for feature in got} == {dtype}
    assert_equal(got, expected, tolerance)


@pytest.mark.parametrize('layer', LAYERS)
def test_a_normalization_in_eval_mode_may_be_folded_into_the_layer(layer: str) -> None:
    """Output and gradients are the same, so that the layer may train."""
    torch.manual_seed(0)
    module = ConvModule(4, 6, 3, padding=1, conv_cfg=dict(type=layer), norm_cfg=dict(type='BN')).eval()
    nn.init.normal_(module.norm.running_mean)
    nn.init.normal_(module.conv.conv_offset.weight)
    x = torch.randn(2, 4, 5, 7)
    results = []
    for folded in (False, True):
        module.turn_on_efficient_conv_bn_eval(folded)
        output = module(x)
        seed = torch.linspace(-1, 1, output.numel()).view_as(output)
        results.append((output, *torch.autograd.grad(output, tuple(module.parameters()), seed)))
    assert_equal(results[1], results[0], 1e-5)
