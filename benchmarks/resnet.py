# SPDX-License-Identifier: Apache-2.0
"""Time a training step of ResNet-50 with DCNv2 in c3-c5: on mmdcn, on torchvision, and with plain convolutions.

The step is the forward and backward pass of the backbone, with automatic mixed precision and in channels_last.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from measure import Call, machine, measure
from run import table, usable, write
from torch import Tensor, nn

import mmdcn

BASELINE = 'plain'
LAST = torch.channels_last
LOW = {'cuda': torch.float16, 'cpu': torch.bfloat16}


class TorchvisionDCNv2(nn.Module):
    """A 3x3 DCNv2 layer on torchvision's operator, with initial offsets of 0 and masks of 0.5."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.weight = conv.stride, conv.weight
        self.conv_offset = nn.Conv2d(conv.in_channels, 27, 3, conv.stride, 1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C, H, W]; all tensors get the dtype that autocast gives the offsets."""
        from torchvision.ops import deform_conv2d

        offset, mask = self.conv_offset(x).split([18, 9], 1)
        x, weight, mask = x.to(offset.dtype), self.weight.to(offset.dtype), mask.sigmoid().to(offset.dtype)
        return deform_conv2d(x, offset, weight, None, self.stride, 1, 1, mask)


def mmdcn_dcnv2(conv: nn.Conv2d) -> nn.Module:
    layer = mmdcn.nn.DCNv2(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False)
    layer.weight = conv.weight
    return layer


LAYERS = {'mmdcn': mmdcn_dcnv2, 'torchvision': TorchvisionDCNv2}


def features(operator: str | None) -> nn.Module:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50()
    if operator is not None:
        for block in (*model.layer2, *model.layer3, *model.layer4):
            block.conv2 = LAYERS[operator](block.conv2)
    return nn.Sequential(*list(model.children())[:-2]).train()


def training_step(operator: str | None, image: Tensor) -> Call:
    device = image.device.type
    model = features(operator).to(device, memory_format=LAST)

    def step() -> None:
        with torch.autocast(device, LOW[device]):
            output = model(image)
        output.float().square().mean().backward()
        model.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344), help='height and width in pixels')
    parser.add_argument('--repeats', type=int, default=7, help='the number of timings of each model')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for results')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    image = torch.randn(args.batch, 3, *args.size, device=args.device).contiguous(memory_format=LAST)
    builds = {name: partial(training_step, name, image) for name in ('mmdcn', 'torchvision')}
    builds = {BASELINE: partial(training_step, None, image), **builds}
    skipped: dict[str, str] = {}
    row = measure(usable(builds, skipped), args.device, args.repeats)
    rows = {f'ResNet-50, batch {args.batch}, {args.size[0]} x {args.size[1]}': row}
    facts = machine(args.device, ('torch', 'mmdcn', 'torchvision'))
    write(facts, {'training step': rows}, skipped, args.out / f'resnet-{args.device}.json')
    print(table(rows, BASELINE))
    for name, reason in skipped.items():
        print(f'skipped {name}: {reason}')
    if 'mmdcn' in skipped:
        sys.exit('mmdcn itself could not run, see above')


if __name__ == '__main__':
    main()
