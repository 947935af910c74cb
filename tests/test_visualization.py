# SPDX-License-Identifier: Apache-2.0
"""Where layers look."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from small_detectors import batch, build, faster_rcnn_config, fcos_config
from torch import nn

from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdcn.visualization import SamplingRecorder


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
        assert layer.stride == other.stride
        torch.testing.assert_close(layer.places, other.places, rtol=0, atol=0)


@pytest.mark.parametrize('config', [fcos_config, faster_rcnn_config])
@pytest.mark.parametrize('layer', ['mmdcn.DCNv2', 'DCN'])
def test_of_a_detector_of_mmengine_the_layers_are_recorded(config: Callable, layer: str) -> None:
    model = build(ConfigDict(config(layer=layer))).eval()
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        model.test_step(batch())
    assert [layer.stride for layer in recorder.layers] == [8, 8, 16, 16]  # two blocks of c3, and two of c4
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
    assert [layer.stride for layer in recorder.layers] == [32] * 3


def test_a_call_without_images_is_named() -> None:
    wrapper = Wrapper()
    with SamplingRecorder(wrapper), pytest.raises(ValueError, match=r"called with images, .* got \['str', 'int'"):
        wrapper('tensor', scale=1, data=[])
