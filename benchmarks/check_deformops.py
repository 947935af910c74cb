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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('case', type=int, choices=range(3), help='0, 1, 2 for c3, c4, c5')
    parser.add_argument('--device', default='cuda')
    args = parser.parse_args()
    found = differences(args.case, args.device)
    print(', '.join(f'{name} {difference:.1e}' for name, difference in found.items()))
    # The result of a few roundings with random signs stays within a few eps of the dtype.
    limit = 8 * torch.finfo(torch.bfloat16).eps
    wrong = [name for name, difference in found.items() if not difference < limit]
    if wrong:
        raise SystemExit(f'{", ".join(wrong)}: more than {limit:.1e} from mmdcn')


if __name__ == '__main__':
    main()
