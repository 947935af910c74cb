# SPDX-License-Identifier: Apache-2.0
"""The deformable layers of other projects, and their checkpoints.

The modules are restated here from their mathematics alone, in float64, with their names.
"""

import torch
from torch import Tensor, nn

from mmdcn.models import ResNet
from mmdcn.modules import DeformConv2dPack, ModulatedDeformConv2dPack


def bilinear_weights(places: Tensor, size: int) -> Tensor:
    """Return the weight of each of `size` pixels in a bilinear sample, [..., size]; beyond them the image is zero."""
    return (1 - (places[..., None] - torch.arange(size).double()).abs()).clamp(min=0)


class Deformable(nn.Module):
    """What all of the modules share: the definition of a deformable convolution, with its places spelled out."""

    def __init__(self, kernel: int, stride: int = 1, padding: int = 1, dilation: int = 1, offset_groups: int = 1):
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.offset_groups = offset_groups

    def deform(
        self,
        x: Tensor,  # [B, C, H, W]
        offset: Tensor,  # [B, 2*G*K, H_out, W_out], (y, x) of each tap
        mask: Tensor | None,  # [B, G*K, H_out, W_out]
        weight: Tensor,  # [C_out, C/groups, k, k]
        bias: Tensor | None,
        mask_groups: int | None = None,
    ) -> Tensor:
        rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in offset.shape[2:]), indexing='ij')
        down, right = torch.meshgrid(*(torch.arange(self.kernel).double() * self.dilation,) * 2, indexing='ij')
        y, x_ = offset.unflatten(1, (self.offset_groups, -1, 2)).unbind(3)  # each [B, G, K, H_out, W_out]
        y = y + rows * self.stride - self.padding + down.reshape(-1, 1, 1)
        x_ = x_ + columns * self.stride - self.padding + right.reshape(-1, 1, 1)
        assert (y.min() < -1) and (x_.max() > x.shape[3])  # there are borders to see
        grouped = x.unflatten(1, (self.offset_groups, -1))
        samples = torch.einsum(
            'bgchw,bgkpqh,bgkpqw->bgckpq', grouped, bilinear_weights(y, x.shape[2]), bilinear_weights(x_, x.shape[3])
        )
        samples = samples.flatten(1, 2)  # [B, C, K, H_out, W_out]
        if mask is not None:
            of_groups = mask.unflatten(1, (mask_groups or self.offset_groups, -1))
            samples = samples * of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], dim=1)
        groups = x.shape[1] // weight.shape[1]
        weight = weight.flatten(2).unflatten(0, (groups, -1))
        out = torch.einsum('bgckpq,gock->bgopq', samples.unflatten(1, (groups, -1)), weight).flatten(1, 2)
        return out if bias is None else out + bias[:, None, None]

    def plain(self, outputs: int, **settings: int) -> nn.Conv2d:
        return nn.Conv2d(4, outputs, self.kernel, self.stride, self.padding, self.dilation, **settings)


class Beside(Deformable):
    """Offsets, and masks after them, from a convolution beside the layer: mmcv's version 1, detectron2, torchvision."""

    def __init__(self, offset: str = 'conv_offset', parts: int = 3, groups: int = 1, mask: str = '', **settings: int):
        super().__init__(3, **settings)
        self.names, self.parts = (offset, mask), parts
        channels = self.offset_groups * 9
        self.conv = nn.Conv2d(4, 6, 3, groups=groups, bias=bool(mask))
        self.add_module(offset, self.plain(channels * (2 if mask else parts)))
        if mask:
            self.add_module(mask, self.plain(channels))

    def forward(self, x: Tensor) -> Tensor:
        predicted = torch.cat([self.get_submodule(name)(x) for name in self.names if name], dim=1)
        offset, mask = predicted.tensor_split([self.offset_groups * 18], dim=1)
        mask = mask.sigmoid() if self.parts == 3 else None
        return self.deform(x, offset, mask, self.conv.weight, self.conv.bias)


class OffsetMask(Deformable):
    """CharlesShang's and chengdazhi's: one convolution within the layer, which does not know of the dilation."""

    def __init__(self, **settings: int):
        super().__init__(3, **settings)
        self.weight, self.bias = nn.Parameter(torch.empty(6, 4, 3, 3)), nn.Parameter(torch.empty(6))
        self.conv_offset_mask = nn.Conv2d(4, self.offset_groups * 27, 3, self.stride, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset_mask(x).chunk(3, dim=1)
        return self.deform(x, torch.cat([first, second], dim=1), mask.sigmoid(), self.weight, self.bias)


class Developer0hye(Deformable):
    def __init__(self, bias: bool, **settings: int):
        super().__init__(3, **settings)
        self.offset_conv, self.modulator_conv = self.plain(18), self.plain(9)
        self.regular_conv = self.plain(6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mask = 2 * self.modulator_conv(x).sigmoid()
        return self.deform(x, self.offset_conv(x), mask, self.regular_conv.weight, self.regular_conv.bias)


class Tvdcn(Deformable):
    def __init__(self, mask_groups: int, generator_bias: bool = False, groups: int = 1, **settings: int):
        super().__init__(3, **settings)
        self.weight, self.bias = nn.Parameter(torch.empty(6, 4 // groups, 3, 3)), nn.Parameter(torch.empty(6))
        each = dict(bias=generator_bias)
        self.offset_generator = self.plain(18 * self.offset_groups, groups=self.offset_groups, **each)
        self.mask_groups = mask_groups
        if mask_groups:
            self.mask_generator = self.plain(9 * mask_groups, groups=mask_groups, **each)

    def forward(self, x: Tensor) -> Tensor:
        mask = 2 * self.mask_generator(x).sigmoid() if self.mask_groups else None
        return self.deform(x, self.offset_generator(x), mask, self.weight, self.bias, self.mask_groups)


class Uiiurz1(nn.Module):
    """4uiiurz1's: on the padded image, to whose edge both corners of a sample and the sample itself are pulled."""

    def __init__(self, kernel: int = 3, stride: int = 1, padding: int = 1, bias: bool = False, modulation: bool = True):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.conv = nn.Conv2d(4, 6, kernel, stride=kernel, bias=bias)
        self.p_conv = nn.Conv2d(4, 2 * kernel**2, 3, padding=1, stride=stride)
        self.m_conv = nn.Conv2d(4, kernel**2, 3, padding=1, stride=stride) if modulation else None

    def forward(self, x: Tensor) -> Tensor:
        offset_y, offset_x = self.p_conv(x).chunk(2, dim=1)  # each [B, K, H_out, W_out]
        padded = nn.functional.pad(x, (self.padding,) * 4)
        taps = (torch.arange(self.kernel) - self.kernel // 2).double()
        down, right = torch.meshgrid(taps, taps, indexing='ij')
        rows, columns = (1 + self.stride * torch.arange(size).double() for size in offset_y.shape[2:])
        y = offset_y + rows[:, None] + down.reshape(-1, 1, 1)
        x_ = offset_x + columns + right.reshape(-1, 1, 1)
        bottom, end = padded.shape[2] - 1, padded.shape[3] - 1
        assert (y < -1).any() and (x_ > end + 1).any()  # there are borders to see
        batch = torch.arange(len(x)).view(-1, 1, 1, 1)
        samples = 0
        for corner_y in (y.floor().clamp(0, bottom), (y.floor() + 1).clamp(0, bottom)):
            for corner_x in (x_.floor().clamp(0, end), (x_.floor() + 1).clamp(0, end)):
                share_y = 1 - (corner_y - y.clamp(0, bottom)).abs()
                share_x = 1 - (corner_x - x_.clamp(0, end)).abs()
                pixels = padded[batch, :, corner_y.long(), corner_x.long()]  # [B, K, H_out, W_out, C]
                samples = samples + pixels * (share_y * share_x)[..., None]
        if self.m_conv is not None:
            samples = samples * self.m_conv(x).sigmoid()[..., None]
        out = torch.einsum('bkpqc,ock->bopq', samples, self.conv.weight.flatten(2))
        return out if self.conv.bias is None else out + self.conv.bias[:, None, None]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, so that many offsets are of several pixels, and the masks are of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module


def dcn(parts: int, kernel: int = 3, padding: int = 1, bias: bool = True, **settings: int) -> nn.Module:
    layer = {2: DeformConv2dPack, 3: ModulatedDeformConv2dPack}[parts]
    return layer(4, 6, kernel, padding=padding, bias=bias, **settings).double()


CASES: dict[str, list[tuple[nn.Module, nn.Module]]] = {
    'mmcv-v1': [
        (Beside(parts=2, stride=2), dcn(2, bias=False, stride=2)),
        (Beside(dilation=2, padding=2, groups=2), dcn(3, bias=False, dilation=2, padding=2, groups=2)),
    ],
    'detectron2': [(Beside(offset_groups=2), dcn(3, bias=False, deform_groups=2))],
    'charlesshang': [
        (OffsetMask(), dcn(3)),
        (OffsetMask(offset_groups=2, stride=2), dcn(3, stride=2, deform_groups=2)),
    ],
    'developer0hye': [
        (Developer0hye(bias=False, dilation=2, padding=2), dcn(3, bias=False, dilation=2, padding=2)),
        (Developer0hye(bias=True, stride=2, padding=0), dcn(3, stride=2, padding=0)),
    ],
    'tvdcn': [
        (Tvdcn(mask_groups=0, offset_groups=2), dcn(2, deform_groups=2)),
        (Tvdcn(mask_groups=1), dcn(3)),
        (Tvdcn(mask_groups=1, offset_groups=2, generator_bias=True), dcn(3, deform_groups=2)),
        (Tvdcn(mask_groups=4, offset_groups=2, groups=2), dcn(3, deform_groups=4, groups=2)),
    ],
    '4uiiurz1': [
        (Uiiurz1(), dcn(3, bias=False)),
        (Uiiurz1(modulation=False, bias=True), dcn(2)),
        (Uiiurz1(stride=2, bias=True), dcn(3, stride=2)),
        (Uiiurz1(kernel=5, stride=2), dcn(3, kernel=5, padding=2, bias=False, stride=2)),
    ],
}  # fmt: skip
CASES['mmdet-v1'] = CASES['mmcv-v1']
CASES['chengdazhi'] = CASES['charlesshang']

# Where the module lies in a checkpoint, and mmdcn's layer in the converted one.
PLACES = dict.fromkeys(CASES, ('block.', 'block.')) | {
    'mmcv-v1': ('block.', 'block.conv.'),
    'mmdet-v1': ('block.', 'block.conv.'),
    'detectron2': ('backbone.bottom_up.res3.0.', 'backbone.layer2.0.conv2.'),
}


def state_of(module: nn.Module, source: str) -> dict[str, Tensor]:
    state = {f'{PLACES[source][0]}{key}': value for key, value in module.state_dict().items()}
    return (
        {key.replace('.conv', '.conv2', 1): value for key, value in state.items()} if source == 'detectron2' else state
    )


def nested(place: str, layer: nn.Module) -> nn.Module:
    for name in reversed(place.strip('.').split('.')):
        layer = nn.ModuleDict({name: layer})
    return layer


# A small ResNet, its offsets drawn at random.
SMALL = dict(depth=50, base_channels=4, stage_with_dcn=(False, True, True, True))


def resnet(kind: type[nn.Module] = ResNet, layer: str = 'mmdcn.DCNv2', **settings: object) -> nn.Module:
    return kind(**SMALL, dcn=dict(type=layer), **settings)


DETECTRON2 = {
    'conv1': 'stem.conv1', 'bn1': 'stem.conv1.norm', 'layer1': 'res2', 'layer2': 'res3', 'layer3': 'res4',
    'layer4': 'res5',
}  # fmt: skip
DETECTRON2_BLOCK = {
    'conv1': 'conv1', 'bn1': 'conv1.norm', 'conv2': 'conv2', 'conv2.conv_offset': 'conv2_offset', 'bn2': 'conv2.norm',
    'conv3': 'conv3', 'bn3': 'conv3.norm', 'downsample.0': 'shortcut', 'downsample.1': 'shortcut.norm',
}  # fmt: skip


def detectron2_name(key: str) -> str:
    stage, _, rest = key.partition('.')
    if not stage.startswith('layer'):
        return f'{DETECTRON2[stage]}.{rest}'
    block, _, rest = rest.partition('.')
    module, _, kind = rest.rpartition('.')
    return f'{DETECTRON2[stage]}.{block}.{DETECTRON2_BLOCK[module]}.{kind}'
