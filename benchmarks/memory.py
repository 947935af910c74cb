# SPDX-License-Identifier: Apache-2.0
"""Measure the memory of a deformable convolution beside inputs and results, for several image and batch sizes."""

import ctypes
from dataclasses import replace

from deform_conv2d import STAGES, Call, conv2d, make_inputs, mmdcn_deform_conv2d, training_call
from measure import peak_memory
from tabulate import tabulate
from tqdm import tqdm

FUNCTIONS = {'conv2d': conv2d, 'mmdcn': mmdcn_deform_conv2d}
CASES = [
    replace(
        stage,
        name=f'{stage.name}, {800 * scale} x {1344 * scale}, batch {batch}',
        batch=batch,
        height=stage.height * scale,
        width=stage.width * scale,
    )
    for stage in STAGES
    for scale in (1, 2)
    for batch in (1, 8)
]


def peak_mebibytes(call: Call) -> str:
    call()
    peak = peak_memory(call, 'cpu')
    return '' if peak is None else f'{peak / 2**20:.0f}'


def main() -> None:
    m_mmap_threshold = -3
    # Makes glibc return freed memory at once, so that the peak contains only memory in use.
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)
    rows = []
    for case in tqdm(CASES, unit='case'):
        contiguous = make_inputs(case, 'cpu')
        cells = [case.name]
        for function in FUNCTIONS.values():
            for x in (contiguous, contiguous.channels_last()):
                cells.append(peak_mebibytes(lambda function=function, x=x: function(x)))
                cells.append(peak_mebibytes(training_call(function, x)))
        rows.append(cells)
    heads = [
        f'{name} {layout}{mode}'
        for name in FUNCTIONS
        for layout in ('NCHW', 'channels_last')
        for mode in ('', ', training')
    ]
    print(tabulate(rows, headers=['peak MiB beside inputs and results', *heads], tablefmt='github'))


if __name__ == '__main__':
    main()
