# SPDX-License-Identifier: Apache-2.0
"""Draw the boxes that a detector finds in an image, or in every image of a folder."""

import argparse
import os
import sys
from pathlib import Path

# While other programs run, a spinning thread can occupy the core that the thread it waits for needs. torch reads the
# spin count when it is imported. See docs/performance.md, "Beside other programs".
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '3000'

from mmdcn import DetInferencer
from mmdcn.engine.launch import LaunchError, run
from mmdcn.engine.loading import check_device, find_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('image', help='the image, or a folder of images')
    parser.add_argument('model', help='a name of the model zoo, or a config file')
    parser.add_argument('--weights', help='the checkpoint, required with a config file')
    parser.add_argument('--out-dir', default='outputs', help='the folder to write into')
    parser.add_argument('--pred-score-thr', type=float, default=0.3, help='the minimum score of a box')
    parser.add_argument('--device', help='the device to run the detector on; by default a GPU if there is one')
    args = parser.parse_args()
    if Path(args.model).is_file() and args.weights is None:
        parser.error(f'{args.model} is a config: it needs --weights')
    return args


def main() -> None:
    args = parse_args()
    if not Path(args.image).exists():
        raise LaunchError(f'{args.image} does not exist')
    if args.device:
        check_device(args.device)
    inferencer = DetInferencer(args.model, args.weights and find_checkpoint(args.weights), args.device)
    inferencer(args.image, out_dir=args.out_dir, pred_score_thr=args.pred_score_thr)
    print(f'wrote {Path(args.out_dir, "vis")}')


if __name__ == '__main__':
    sys.exit(run(main))
