# SPDX-License-Identifier: Apache-2.0
"""Count the least time that a GPU needs for a deformable convolution: what is moved and multiplied, over its rates.

The columns are counted as written to the second-level cache (L2) and read again, as csrc/cuda does it; images, offsets
and results move once between the device's memory and L2. Of the 4 corners of each sample those are counted as read from
L2 that are new to their thread block: the others are in the multiprocessor's own cache, if it is large enough. As many
sums the block adds to the gradient of the image. This needs no GPU.
"""

import argparse
from dataclasses import dataclass

import torch
from deform_conv2d import CASES, Case
from tabulate import tabulate

BLOCK = (8, 9)  # output positions and taps of a thread block of csrc/cuda


def corners_per_sample(positions: int, taps: int, height: int = 100, width: int = 168) -> float:
    """Count the corners, of 4, that are new to a thread block of so many positions of a row and taps of a 3x3.

    The offsets are drawn as the benchmark draws them, from a normal distribution of 1 pixel.
    """
    torch.manual_seed(0)
    out_y, out_x, tap = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(9), indexing='ij')
    y, x = (regular + torch.randn(tap.shape) for regular in (out_y + tap // 3, out_x + tap % 3))
    pixel = 1000 * y.floor().long() + x.floor().long() + 10_000
    corners = torch.stack([pixel, pixel + 1, pixel + 1000, pixel + 1001])
    block = (out_y * width + out_x) // positions * 9 + tap // taps
    return torch.unique(block * 1_000_000 + corners).numel() / tap.numel()


@dataclass
class Work:
    """What one call multiplies and moves."""

    operations: float  # of the matrix products: of a plain convolution too
    cache_bytes: float  # between multiprocessors and L2
    memory_bytes: float  # between L2 and the device's memory


def work(case: Case, corners: float, training: bool) -> Work:
    """Count a forward, or a forward and a backward with all gradients, of a channels_last image."""
    positions, taps, size = case.batch * case.height * case.width, case.kernel**2, case.dtype.itemsize
    column = positions * taps * case.channels
    image = positions * case.stride**2 * case.channels
    output = positions * case.channels
    offsets = positions * taps * (3 if case.mask else 2) * case.offset_groups * 4
    forward = Work(
        operations=2 * column * case.channels / case.groups,
        cache_bytes=(corners + 2) * column * size,  # a column out and in
        memory_bytes=(image + output) * size + offsets,
    )
    if not training:
        return forward
    # Gradients of columns out and in, corners, columns out and in; a block's float32 sums into the image's gradient.
    backward_cache = (2 + corners + 2) * column * size + corners * column * 4
    # The image, the output's gradient; the image's gradient summed in float32, then in its type; offsets in and out.
    backward_memory = (image + output) * size + image * (8 + size) + 2 * offsets
    return Work(3 * forward.operations, forward.cache_bytes + backward_cache, forward.memory_bytes + backward_memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--memory', type=float, default=4.8, help="TB/s of the device's memory [%(default)s: H200]")
    parser.add_argument('--cache', type=float, default=5.5, help='TB/s of L2 [%(default)s: measured by others on H100]')
    parser.add_argument('--half', type=float, default=989, help='dense TFLOP/s, fp16 and bf16 [%(default)s: H200]')
    parser.add_argument('--single', type=float, default=67, help='TFLOP/s, fp32 without TF32 [%(default)s: H200]')
    rates = parser.parse_args()
    print('corners of a sample that a thread block reads from L2, of 4:')
    for positions, taps in ((32, 1), (8, 9), (16, 9), (32, 9)):
        print(f'  {corners_per_sample(positions, taps):.2f}  {positions} positions, {taps} of 9 taps')
    corners = corners_per_sample(*BLOCK)
    print('\n{} positions, {} taps:\n'.format(*BLOCK))
    rows = []
    for group in ('stages', 'bf16'):
        for training in (False, True):
            for case in CASES['cuda'][group]:
                counted = work(case, corners, training)
                product = counted.operations / (rates.single if case.dtype == torch.float32 else rates.half) / 1e6
                sampling = max(counted.cache_bytes / rates.cache, counted.memory_bytes / rates.memory) / 1e6
                mode = 'forward + backward' if training else 'forward'
                cells = (product, sampling, product + sampling)
                rows.append([case.name, mode, *(f'{cell:.0f}' for cell in cells), f'{1 + sampling / product:.2f}'])
    heads = ['', '', 'product, us (conv2d)', 'sampling, us', 'sum', 'sum / conv2d']
    print(tabulate(rows, headers=heads, tablefmt='github', disable_numparse=True))


if __name__ == '__main__':
    main()
