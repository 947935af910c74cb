# SPDX-License-Identifier: Apache-2.0
"""Count the least time that a GPU needs for a deformable convolution: what is moved and multiplied, over its rates.

The corners of each sample are counted as read from the second-level cache (L2) and the columns as written there and
read again, as csrc/cuda does it; images, offsets and results move once between the device's memory and the cache. What
the first-level caches save is not counted, so a kernel that uses them well may be faster. This needs no GPU.
"""

import argparse
from dataclasses import dataclass

import torch
from deform_conv2d import CASES, Case
from tabulate import tabulate


@dataclass
class Work:
    """What one call multiplies and moves."""

    operations: float  # of the matrix products: of a plain convolution too
    cache_bytes: float  # between multiprocessors and L2
    memory_bytes: float  # between L2 and the device's memory


def work(case: Case, training: bool) -> Work:
    """Count a forward, or a forward and a backward with all gradients, of a channels_last image."""
    positions, taps, size = case.batch * case.height * case.width, case.kernel**2, case.dtype.itemsize
    column = positions * taps * case.channels
    image = positions * case.stride**2 * case.channels
    output = positions * case.channels
    offsets = positions * taps * (3 if case.mask else 2) * case.offset_groups * 4
    forward = Work(
        operations=2 * column * case.channels / case.groups,
        cache_bytes=(4 + 2) * column * size,  # 4 corners; a column out and in
        memory_bytes=(image + output) * size + offsets,
    )
    if not training:
        return forward
    # Gradients of columns out and in, 4 corners, columns out and in; 4 float32 sums into the image's gradient.
    backward_cache = (2 + 4 + 2) * column * size + 4 * column * 4
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
    rows = []
    for group in ('stages', 'bf16'):
        for training in (False, True):
            for case in CASES['cuda'][group]:
                counted = work(case, training)
                product = counted.operations / (rates.single if case.dtype == torch.float32 else rates.half) / 1e6
                sampling = max(counted.cache_bytes / rates.cache, counted.memory_bytes / rates.memory) / 1e6
                mode = 'forward + backward' if training else 'forward'
                cells = (product, sampling, product + sampling)
                rows.append([case.name, mode, *(f'{cell:.0f}' for cell in cells), f'{1 + sampling / product:.2f}'])
    heads = ['', '', 'product, us (conv2d)', 'sampling, us', 'sum', 'sum / conv2d']
    print(tabulate(rows, headers=heads, tablefmt='github', disable_numparse=True))


if __name__ == '__main__':
    main()
