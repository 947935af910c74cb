# SPDX-License-Identifier: Apache-2.0
"""Measure how much faster a deformable convolution is with all threads than with one."""

import torch
from deform_conv2d import STAGES, Call, conv2d, make_inputs, mmdcn_deform_conv2d, training_call
from measure import measure
from tabulate import tabulate
from tqdm import tqdm

FUNCTIONS = {'conv2d': conv2d, 'mmdcn': mmdcn_deform_conv2d}
REPEATS = 7


def with_threads(threads: int, call: Call) -> Call:
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    return run


def main() -> None:
    most = torch.get_num_threads()
    rows = []
    for case in tqdm(STAGES, unit='case'):
        contiguous = make_inputs(case, 'cpu')
        candidates = {}
        for name, function in FUNCTIONS.items():
            for layout, x in (('NCHW', contiguous), ('channels_last', contiguous.channels_last())):
                calls = {'': lambda function=function, x=x: function(x), ', training': training_call(function, x)}
                for mode, call in calls.items():
                    for threads in (1, most):
                        candidates[f'{name} {layout}{mode}', threads] = with_threads(threads, call)
        measured = measure(candidates, 'cpu', REPEATS, memory=False)
        heads = [name for name, threads in candidates if threads == 1]
        rows.append([case.name, *(f'{measured[n, 1].median / measured[n, most].median:.2f}' for n in heads)])
    print(tabulate(rows, headers=[f'1 thread / {most} threads', *heads], tablefmt='github', disable_numparse=True))


if __name__ == '__main__':
    main()
