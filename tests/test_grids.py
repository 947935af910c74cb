# SPDX-License-Identifier: Apache-2.0
"""A position of a feature map lies on the middle of the pixels that it depends on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import ModulatedDeformConv2dPack
from torch import Tensor, nn

import mmdcn
from mmdcn.visualization import Grid, GridTracker, SamplingRecorder

SIZE = (96, 80)


def focus(x: Tensor) -> Tensor:
    """The first layer of YOLOX."""
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], dim=1)


CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    'convolution': lambda x: F.conv2d(x, torch.ones(2, 1, 7, 5).double(), stride=(2, 3), padding=(3, 1)),
    'no padding': lambda x: F.conv2d(x, torch.ones(2, 1, 4, 3).double(), dilation=(2, 3)),
    'two convolutions': lambda x: F.conv2d(
        F.conv2d(x, torch.ones(1, 1, 3, 3).double(), stride=2, padding=1).relu(), torch.ones(1, 1, 2, 2).double(),
        stride=2,
    ),
    'average pooling': lambda x: F.avg_pool2d(x, (2, 4), padding=(1, 0)),
    'transposed convolution': lambda x: F.conv_transpose2d(
        x[:, :, :6, :8], torch.ones(1, 1, 4, 3).double(), stride=(3, 2), padding=(1, 0)
    ),
    'bilinear': lambda x: F.interpolate(x, scale_factor=0.5, mode='bilinear'),
    'bilinear, corners': lambda x: F.interpolate(x, size=(39, 159), mode='bilinear', align_corners=True),
    'nearest': lambda x: F.interpolate(F.avg_pool2d(x, 4), scale_factor=2, mode='nearest'),
    'padding': lambda x: F.avg_pool2d(F.pad(x, (5, 0, 2, 1)), 3, stride=1),
    'slice': lambda x: F.conv2d(x[:, :, 3:-2, -40::2], torch.ones(1, 1, 3, 3).double()),
    'views and types': lambda x: F.avg_pool2d(x, 2).to(torch.float32).view(1, 1, -1).view(1, 1, 48, 40) + 1,
    'chunks': lambda x: torch.cat(F.conv2d(x, torch.ones(4, 1, 5, 5).double()).chunk(2, dim=1)[::-1], dim=1),
}  # fmt: skip


@pytest.mark.parametrize('chain', CHAINS)
def test_the_place_is_the_centre_of_what_a_position_depends_on(chain: str) -> None:
    image = torch.ones(1, 1, *SIZE, dtype=torch.float64, requires_grad=True)
    tracker = GridTracker()
    tracker.note(image, Grid())
    with tracker:
        output = CHAINS[chain](image)
    grid = tracker.grid_of(output)
    assert grid is not None
    # The mean of a block: neighbours in a transposed convolution's output depend on unlike numbers of pixels.
    block = [(output.shape[-2] // 4 * 2 + i, output.shape[-1] // 4 * 2 + j) for i in range(6) for j in range(6)]
    centres = []
    for i, j in block:
        (gradient,) = torch.autograd.grad(output[0, 0, i, j], image, retain_graph=True)
        weight = gradient[0, 0] / gradient.sum()
        centres.append(torch.stack([(weight.sum(1 - axis) * torch.arange(SIZE[axis])).sum() for axis in (0, 1)]))
    places = grid.places(torch.tensor(block, dtype=torch.float64))
    torch.testing.assert_close(places.mean(0), torch.stack(centres).mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(grid.positions(places), torch.tensor(block).double(), rtol=0, atol=1e-9)


def test_of_yolox_s_first_layer_the_grid_is_that_of_its_first_part() -> None:
    image = torch.zeros(1, 3, *SIZE)
    tracker = GridTracker()
    tracker.note(image, Grid())
    with tracker:
        output = focus(image)
    assert tracker.grid_of(output) == Grid((2.0, 2.0), (0.0, 0.0))


@pytest.mark.parametrize('rows', [33, 48, 63, 64])
@pytest.mark.parametrize('layer', [mmdcn.DCN, ModulatedDeformConv2dPack])
def test_the_stride_is_that_of_the_network_whatever_the_rows_of_the_image(rows: int, layer: type[nn.Module]) -> None:
    """48 rows at stride 32 give a map of 2 rows, as those at stride 24 do."""
    steps = [nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(4)]
    model = nn.Sequential(*steps, layer(3, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True), layer(3, 3, 3, padding=1))
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, rows, 80))
    first, second = recorder.layers
    assert first.grid == Grid((32.0, 32.0), (0.0, 0.0))
    assert second.grid == Grid((32.0, 32.0), (0.0, 0.0), layer=0)
    assert first.places[0, 4].flatten(1).T.tolist()[:2] == [[0.0, 0.0], [0.0, 32.0]]


def test_a_layer_without_padding_begins_inside_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 7, stride=2), mmdcn.DCN(3, 3, 3))
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 40, 40))
    assert recorder.layers[0].grid == Grid((2.0, 2.0), (5.0, 5.0))


def test_layers_are_followed_along_the_features() -> None:
    """The order of their calls does not matter."""

    class TwoBranches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.last = (mmdcn.DCN(3, 3, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            left, _ = self.left(x), self.right(x)
            return self.last(self.last(left))

    model = TwoBranches()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 12, 16))
    assert [layer.name for layer in recorder.layers] == ['stem', 'left', 'right', 'last', 'last#2']
    assert recorder.points('last#2', 6, 8, depth=9)[0].shape == (9**4, 2)  # stem, left, last, and last again


def test_a_map_of_unknown_origin_has_the_edges_of_the_image() -> None:
    """Maps of regions are left out."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.regions = mmdcn.DCN(3, 3, 3, padding=1), mmdcn.DCN(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.from_numpy(x[..., ::4, ::4].numpy().copy())
            return self.tokens(tokens), self.regions(torch.zeros(5, 3, 7, 7))

    model = Network()
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 24, 16))
    assert [(layer.name, layer.grid) for layer in recorder.layers] == [('tokens', Grid((4.0, 4.0), (1.5, 1.5)))]


def test_an_error_in_the_model_leaves_nothing_behind() -> None:
    class Failing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError('fails')

    model = Failing(mmdcn.DCN(3, 3, 3))
    recorder = SamplingRecorder(model)
    with recorder:
        with pytest.raises(RuntimeError, match='fails'):
            model(torch.zeros(1, 3, 8, 8))
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not model._forward_hooks and not model._forward_pre_hooks
