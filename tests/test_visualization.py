# SPDX-License-Identifier: Apache-2.0
"""Where layers look."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from small_detectors import batch, build, faster_rcnn_config, fcos_config
from torch import nn

from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdcn.visualization import (
    OffsetStatistics,
    Sampling,
    SamplingRecorder,
    effective_receptive_field,
    offset_statistics,
    watched,
)
from mmdcn.visualization.drawing import (
    Detection,
    Picture,
    draw_detections,
    field_figure,
    new_figure,
    pixels_of,
    points_figure,
)


def network() -> nn.Sequential:
    """Two layers at strides 2 and 4: position i of the last one lies on pixel 4 * i."""
    return nn.Sequential(
        ModulatedDeformConv2dPack(3, 2, 3, stride=2, padding=1), DeformConv2dPack(2, 2, 3, stride=2, padding=1)
    )


def test_a_new_layer_looks_at_the_regular_grid_around_a_place() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('1', y=13.0, x=8.0, depth=1)
    # The nearest position to (13, 8) is (3, 2), on pixel (12, 8); its taps step over the pixels of the layer before.
    expected = [[y, x] for y in (10, 12, 14) for x in (6, 8, 10)]
    assert places.tolist() == expected
    assert weights.tolist() == [1.0] * 9


def test_offsets_move_the_places_and_masks_weigh_them() -> None:
    model = network()
    with torch.no_grad():
        model[0].conv_offset.bias[2 * 4 : 2 * 4 + 2] = torch.tensor([0.5, -2.0])  # the middle tap, (y, x)
        model[0].conv_offset.bias[18 + 4] = 100.0  # its mask: sigmoid gives 1
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('0', y=12.0, x=8.0, depth=1)
    assert places[4].tolist() == [12.5, 6.0]
    assert weights.tolist() == pytest.approx([0.5] * 4 + [1.0] + [0.5] * 4)


def test_the_taps_are_followed_through_the_layers_before() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('1', y=12.0, x=8.0, depth=2)
    assert places.shape == (81, 2)
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(9, 16) for x in range(5, 12)}
    assert weights.tolist() == [0.5] * 81  # the new DCNv2's masks


def test_nothing_stays_attached_to_the_model() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        pass
    model(torch.zeros(1, 3, 32, 24))
    assert recorder.layers == []


IMAGES = torch.zeros(2, 3, 32, 24)


class Wrapper(nn.Module):
    """A model whose forward takes the images by a name of its own, among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, mode: str, scale: torch.Tensor, data: Any) -> torch.Tensor:
        return self.network(data['images'] if isinstance(data, dict) else torch.stack(data))


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    'by keyword': lambda model: model(mode='tensor', scale=torch.ones(2), data=dict(images=IMAGES)),
    'by position': lambda model: model('tensor', torch.ones(2), dict(images=IMAGES)),
    'as a list': lambda model: model('tensor', torch.ones(2), data=list(IMAGES)),
}


@pytest.mark.parametrize('way', CALLS)
def test_however_a_model_takes_its_images_the_places_are_the_same(way: str) -> None:
    plain, wrapper = network(), Wrapper()
    with SamplingRecorder(plain) as expected:
        plain(input=IMAGES)
    with SamplingRecorder(wrapper) as recorder:
        CALLS[way](wrapper)
    assert [layer.name for layer in recorder.layers] == ['network.0', 'network.1']
    for layer, other in zip(recorder.layers, expected.layers, strict=True):
        assert layer.grid == other.grid
        torch.testing.assert_close(layer.places, other.places, rtol=0, atol=0)


@pytest.mark.parametrize('config', [fcos_config, faster_rcnn_config])
@pytest.mark.parametrize('layer', ['mmdcn.DCNv2', 'DCN'])
def test_of_a_detector_of_mmengine_the_layers_are_recorded(config: Callable, layer: str) -> None:
    model = build(ConfigDict(config(layer=layer))).eval()
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        model.test_step(batch())
    assert [layer.grid.stride[0] for layer in recorder.layers] == [8, 8, 16, 16]  # two blocks of c3, and two of c4
    with SamplingRecorder(model) as recorder:
        model(**model.data_preprocessor(batch(), True), mode='loss')
    assert len(recorder.layers) == 4


def test_of_a_segmentor_of_mmseg_the_layers_are_recorded() -> None:
    models, structures = pytest.importorskip('mmseg.models'), pytest.importorskip('mmseg.structures')
    stages = dict(dcn=dict(type='mmdcn.DCNv2'), stage_with_dcn=(False, False, False, True))
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = models.EncoderDecoder(
            backbone=dict(type='ResNetV1c', depth=50, base_channels=4, **stages),
            decode_head=dict(type='FCNHead', in_channels=128, in_index=3, channels=8, num_classes=3),
            data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96)),
            test_cfg=ConfigDict(mode='whole'),
        )
    sample = structures.SegDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96)))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, 64, 96, dtype=torch.long))
    with torch.no_grad(), SamplingRecorder(model.eval()) as recorder:
        model.test_step(dict(inputs=[torch.zeros(3, 64, 96)], data_samples=[sample]))
    assert [layer.grid.stride[0] for layer in recorder.layers] == [32] * 3


def test_a_call_without_images_is_named() -> None:
    wrapper = Wrapper()
    with SamplingRecorder(wrapper), pytest.raises(ValueError, match=r"called with images, .* got \['str', 'int'"):
        wrapper('tensor', scale=1, data=[])


def statistics_of(layer: nn.Module, image: torch.Tensor) -> OffsetStatistics:
    seen: list[Sampling] = []
    with watched(layer, lambda _, sampling: seen.append(sampling)), torch.no_grad():
        layer(image)
    return offset_statistics(seen[0])


def test_a_new_layer_s_offsets_are_zero_and_its_padding_is_not_outside() -> None:
    layer = DeformConv2dPack(2, 2, 3, padding=1)
    assert statistics_of(layer, torch.randn(2, 2, 5, 7)) == OffsetStatistics(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize('layer', [DeformConv2dPack, ModulatedDeformConv2dPack])
@pytest.mark.parametrize('groups', [1, 2])
def test_statistics_are_those_of_every_vector_by_itself(layer: type[nn.Module], groups: int) -> None:
    torch.manual_seed(0)
    model = layer(4, 4, 3, stride=(1, 2), padding=(1, 0), deform_groups=groups)
    nn.init.normal_(model.conv_offset.weight, std=0.5)
    image = torch.randn(2, 4, 6, 9)
    offset = model.conv_offset(image).detach()[:, : 18 * groups]
    lengths, inside, moved_out = [], 0, 0
    for channel in range(0, 18 * groups, 2):
        tap = channel // 2 % 9
        for b in range(2):
            for i in range(offset.shape[2]):
                for j in range(offset.shape[3]):
                    y, x = i - 1 + tap // 3, 2 * j + tap % 3
                    dy, dx = offset[b, channel : channel + 2, i, j].tolist()
                    lengths.append((dy**2 + dx**2) ** 0.5)
                    if -1 < y < 6 and -1 < x < 9:
                        inside += 1
                        moved_out += not (-1 < y + dy < 6 and -1 < x + dx < 9)
    found = statistics_of(model, image)
    assert moved_out > 0
    mean = sum(lengths) / len(lengths)
    assert found.mean == pytest.approx(mean, rel=1e-5)
    assert found.relative == pytest.approx(mean / 6, rel=1e-5)
    assert found.percentile_99 == pytest.approx(sorted(lengths)[-(-99 * len(lengths) // 100) - 1], rel=1e-5)
    assert found.outside == moved_out / inside


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_offsets_that_are_not_finite_show_in_the_statistics(value: float) -> None:
    layer = DeformConv2dPack(2, 2, 3, padding=1)
    with torch.no_grad():
        layer.conv_offset.bias[3] = value
    found = statistics_of(layer, torch.zeros(1, 2, 4, 4))
    assert not found.mean < float('inf')
    assert found.outside > 0


def test_the_receptive_field_of_a_convolution_is_its_kernel() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 10).view(1, 1, 3, 3))
        model[1].weight.copy_(torch.tensor([[1.0, 0, -1], [0, 0, 0]]).view(2, 1, 1, 3))
    field = effective_receptive_field(model, torch.randn(2, 1, 8, 9), '1', (4, 5))
    expected = torch.zeros(8, 9)
    rows = torch.arange(1.0, 10).view(3, 3)
    expected[3:6, 3:6] += rows
    expected[3:6, 5:8] -= rows
    torch.testing.assert_close(field, expected.abs())
    assert effective_receptive_field(model, torch.randn(1, 1, 8, 9), '0', (0, 0)).nonzero().tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1],
    ]  # fmt: skip


def test_the_receptive_field_follows_the_offsets() -> None:
    model = nn.Sequential(DeformConv2dPack(1, 1, 1))
    with torch.no_grad():
        model[0].conv_offset.bias.copy_(torch.tensor([2.0, -3.0]))
        model[0].weight.fill_(5.0)
    field = effective_receptive_field(model, torch.zeros(1, 1, 9, 9), '0', (4, 4))
    assert field.nonzero().tolist() == [[6, 1]]
    assert field[6, 1] == 5


def test_a_receptive_field_of_what_is_not_there_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    image = torch.zeros(1, 1, 5, 5)
    with pytest.raises(ValueError, match="layer must name a module of the model, such as '0', got 'layer9'"):
        effective_receptive_field(model, image, 'layer9', (0, 0))
    with pytest.raises(ValueError, match=r'index must lie in the output of 3 x 3 positions, got \(3, 0\)'):
        effective_receptive_field(model, image, '0', (3, 0))


def test_an_unknown_layer_is_named() -> None:
    model = network()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    with pytest.raises(ValueError, match=r"name must be one of \['0', '1'\], got 'conv'"):
        recorder.points('conv', 0, 0)


def test_the_plain_grid_can_be_followed_instead() -> None:
    model = network()
    with torch.no_grad():
        model[0].conv_offset.bias[:18] = 5.0
        model[1].conv_offset.bias[:] = -3.0
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    places, weights = recorder.points('1', y=12.0, x=8.0, depth=2, regular=True)
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(9, 16) for x in range(5, 12)}
    assert weights.tolist() == [1.0] * 81


PICTURE = Picture(np.zeros((32, 24, 3), np.uint8))


def figure_of_points() -> Figure:
    model = network()
    with SamplingRecorder(model) as recorder:
        model(torch.zeros(1, 3, 32, 24))
    return points_figure(PICTURE, recorder, '1', [(12.0, 8.0)], depth=1)


def figure_of_a_field() -> Figure:
    return field_figure(PICTURE, [torch.eye(32, 24)], [(12.0, 8.0)], 'backbone.layer2.1.conv2')


@pytest.mark.parametrize('draw', [figure_of_points, figure_of_a_field])
def test_the_title_of_a_single_image_is_not_cut_off(draw: Callable[[], Figure]) -> None:
    figure = draw()
    pixels_of(figure)
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
    assert title.y1 <= figure.bbox.height


def test_the_label_with_the_highest_score_lies_on_top() -> None:
    _, ((ax,),) = new_figure(1, 1, PICTURE.pixels)
    detections = [Detection(4.0, 8.0, 20.0, 28.0, label, score) for label, score in (('a', 0.9), ('b', 0.4))]
    draw_detections(ax, PICTURE, SamplingRecorder(network()), detections, depth=1)
    assert [text.get_text() for text in ax.texts] == ['b 0.40', 'a 0.90']
