# SPDX-License-Identifier: Apache-2.0
"""The backbones."""

import pytest
import torch
from mmdet.models.backbones import ResNet as MMDetResNet

from mmdcn.models import ResNet
from mmdcn.modules import ModulatedDeformConv2dPack

DCN = dict(type='mmdcn.DCNv2', deform_groups=1, fallback_on_stride=False)


@pytest.mark.parametrize(('depth', 'count'), [(18, 6), (34, 13), (50, 13)])
def test_every_block_of_the_chosen_stages_has_one_deformable_layer(depth: int, count: int) -> None:
    backbone = ResNet(depth, base_channels=4, dcn=dict(DCN), stage_with_dcn=(False, True, True, True))
    layers = [name for name, layer in backbone.named_modules() if isinstance(layer, ModulatedDeformConv2dPack)]
    assert len(layers) == count
    assert all(name.endswith('conv2') and not name.startswith('layer1') for name in layers)


@pytest.mark.parametrize('depth', [18, 50])
def test_without_dcn_it_is_the_resnet_of_mmdet(depth: int) -> None:
    torch.manual_seed(0)
    ours, theirs = ResNet(depth, base_channels=4), MMDetResNet(depth, base_channels=4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 33, 47)
    for got, expected in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_deformable_resnet18_trains_its_offsets() -> None:
    torch.manual_seed(0)
    backbone = ResNet(18, base_channels=4, dcn=dict(DCN), stage_with_dcn=(False, True, True, True))
    # Against random targets: the sum of a normalised map is constant.
    loss = sum((feature * torch.randn_like(feature)).sum() for feature in backbone(torch.randn(2, 3, 64, 96)))
    loss.backward()
    assert all(
        parameter.grad.abs().max() > 0 for name, parameter in backbone.named_parameters() if 'conv_offset' in name
    )
