# SPDX-License-Identifier: Apache-2.0
"""Print how long each kernel of a call takes on the GPU, in microseconds, as torch's profiler sees it.

On a CPU it prints torch's operators instead of kernels.
"""

import argparse
from collections.abc import Iterator

import torch
from deform_conv2d import CASES, forward_candidates, training_candidates
from kernels import short
from measure import Call, synchronize
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MODES = {'forward': forward_candidates, 'forward + backward': training_candidates}
CANDIDATES = ('conv2d channels_last', 'mmdcn channels_last', 'mmdcn channels_last, new kernels')
Times = dict[str, float]  # microseconds in a call, by kernel


def kernel_times(call: Call, device: str, repeats: int) -> Times:
    call()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == 'cuda' else [])]) as events:
        for _ in range(repeats):
            call()
        synchronize(device)
    own = DeviceType.CUDA if device == 'cuda' else DeviceType.CPU
    time = f'self_{"device" if device == "cuda" else "cpu"}_time_total'
    return {
        short(event.key): getattr(event, time) / repeats for event in events.key_averages() if event.device_type == own
    }


def table(by_case: dict[str, Times]) -> str:
    """Return a table with a row for each kernel, the slowest first, and their sums."""
    names = dict.fromkeys(name for times in by_case.values() for name in times)
    rows = [[name, *(times.get(name, 0) for times in by_case.values())] for name in names]
    rows.sort(key=lambda row: -max(row[1:]))
    rows.append(['all', *(sum(times.values()) for times in by_case.values())])
    return tabulate(rows, headers=['kernel', *by_case], tablefmt='github', floatfmt='.1f')


def tables(group: str, device: str, repeats: int) -> Iterator[str]:
    for name in CANDIDATES:
        for mode, candidates in MODES.items():
            by_case = {}
            for case in CASES[device][group]:
                builds = candidates(case, device)
                if name in builds:
                    by_case[case.name] = kernel_times(builds[name](), device, repeats)
            if by_case:
                yield f'{name}, {mode}:\n\n{table(by_case)}\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--device', default='cuda', choices=list(CASES))
    parser.add_argument('--group', default='new', help='a group of shapes of the benchmark')
    parser.add_argument('--repeats', type=int, default=10, help='the number of calls')
    args = parser.parse_args()
    if args.group not in CASES[args.device]:
        parser.error(f'--group must be one of {", ".join(CASES[args.device])}, got {args.group}')
    torch.backends.cudnn.benchmark = True  # as in the benchmark
    for text in tables(args.group, args.device, args.repeats):
        print(text, flush=True)


if __name__ == '__main__':
    main()
