# SPDX-License-Identifier: Apache-2.0
"""Compare deformops with mmdcn on a shape of the benchmark, which also compiles the kernels for that shape."""

import argparse

import torch
from deform_conv2d import CASES, deformops_deform_conv2d, make_inputs, mmdcn_deform_conv2d, training_call


def differences(case_number: int, device: str) -> dict[str, float]:
    """Return the relative differences of the output and of each gradient, in the layout of deformops."""
    x = make_inputs(CASES[device]['deformops'][case_number], device)
    ours = list(training_call(mmdcn_deform_conv2d, x)())
    output, image, offset, weight, mask = ours
    as_theirs = [output.movedim(1, -1), image.movedim(1, -1), offset, weight, mask]
    places = (x.offset_groups, -1)
    as_theirs[2] = offset.movedim(1, -1).unflatten(-1, (*places, 2))
    as_theirs[4] = mask.movedim(1, -1).unflatten(-1, places)
    theirs = training_call(deformops_deform_conv2d, x.channels_inside())()
    names = ('output', 'input', 'offset', 'weight', 'mask')
    return {
        name: ((a.double() - b.double()).norm() / b.double().norm()).item()
        for name, a, b in zip(names, theirs, as_theirs, strict=True)
    }


def keep_part(part: int, parts: int) -> None:
    """Leave the autotuner one part of its configurations, so that processes compile them side by side."""
    from deformops.backends.triton._kernels import conv_deform2d

    for kernel in (conv_deform2d._conv_forward_kernel, conv_deform2d._conv_backward_kernel):
        kernel.configs = kernel.configs[part::parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('case', type=int, choices=range(3), help='0, 1, 2 for c3, c4, c5')
    parser.add_argument('--device', default='cuda')
    parser.add_argument(
        '--part', type=int, nargs=2, default=(0, 1), help='the part of the configurations, and the parts'
    )
    args = parser.parse_args()
    keep_part(*args.part)
    found = differences(args.case, args.device)
    print(', '.join(f'{name} {difference:.1e}' for name, difference in found.items()))
    # The result of a few roundings with random signs stays within a few eps of the dtype.
    limit = 8 * torch.finfo(torch.bfloat16).eps
    wrong = [name for name, difference in found.items() if not difference < limit]
    if wrong:
        raise SystemExit(f'{", ".join(wrong)}: more than {limit:.1e} from mmdcn')


if __name__ == '__main__':
    main()
