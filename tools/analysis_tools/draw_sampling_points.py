# SPDX-License-Identifier: Apache-2.0
"""Draw a detector's detections on test images, and where its deformable layers look for each."""

import argparse
import os
import sys
from pathlib import Path

# Threads that wait for each other by spinning take the cores that they wait for, where others work beside them. torch
# reads the number of turns when it is imported: see docs/performance.md, "Beside other programs".
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '10000'

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config

from mmdcn.engine.launch import LaunchError, run
from mmdcn.visualization import SamplingRecorder

# Behind the text, so that it can be read on any ground.
LABEL = dict(facecolor='black', alpha=0.6, lw=0, pad=0.8)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('config', help='the config file')
    parser.add_argument('checkpoint', help='the checkpoint file')
    parser.add_argument('--out', type=Path, required=True, help='the picture to write')
    parser.add_argument('--num-images', type=int, default=8, help='how many test images to draw')
    parser.add_argument('--score', type=float, default=0.5, help='least score of a detection to draw')
    parser.add_argument('--depth', type=int, default=2, help='how many layers to follow the taps through')
    parser.add_argument('--device', default='cpu', help='where to run the detector')
    return parser.parse_args()


def draw_image(
    ax: Axes,
    image: np.ndarray,  # [H, W, 3], RGB
    sample: DetDataSample,
    recorder: SamplingRecorder,
    classes: tuple[str, ...],
    args: argparse.Namespace,
) -> None:
    """Draw the boxes, and for each the sampling points of its centre in the layer that suits its size."""
    ax.imshow(image)
    ax.set_axis_off()
    scale_x, scale_y = sample.metainfo.get('scale_factor', (1.0, 1.0))
    found = sample.pred_instances.cpu()
    found = found[found.scores >= args.score]
    for box, label, score in zip(found.bboxes, found.labels, found.scores, strict=True):
        left, top, right, bottom = box.tolist()
        ax.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color='lime', lw=1.2))
        ax.text(left, top - 1, f'{classes[label]} {score:.2f}', color='lime', fontsize=7, va='bottom', bbox=LABEL)
        if not recorder.layers:
            continue
        y, x = (top + bottom) / 2, (left + right) / 2
        layer = layer_for(recorder, max(right - left, bottom - top))
        places, weights = recorder.points(layer, y * scale_y, x * scale_x, args.depth)
        shade = (weights / weights.max()).clamp(min=0.25)
        ax.scatter(places[:, 1] / scale_x, places[:, 0] / scale_y, s=7, c='red', alpha=shade.numpy(), lw=0)
        ax.plot(x, y, '+', color='cyan', ms=6)
    ax.set_xlim(0, image.shape[1])
    ax.set_ylim(image.shape[0], 0)


def layer_for(recorder: SamplingRecorder, size: float) -> str:
    """Give the last layer of the stride that puts about eight positions across an object."""
    strides = {layer.stride: layer.name for layer in recorder.layers}
    return strides[min(strides, key=lambda stride: abs(np.log2(stride * 8 / size)))]


def main() -> None:
    args = parse_args()
    for path in (args.config, args.checkpoint):
        if not Path(path).is_file():
            raise LaunchError(f'{path} does not exist')
    cfg = Config.fromfile(args.config)
    model = init_detector(cfg, args.checkpoint, device=args.device)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    columns = min(4, args.num_images)
    rows = -(-args.num_images // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.3 * rows), squeeze=False)
    for ax in axes.flat[args.num_images :]:
        ax.set_axis_off()
    for index, ax in zip(range(args.num_images), axes.flat, strict=False):
        image = mmcv.imread(dataset.get_data_info(index)['img_path'])
        with torch.no_grad(), SamplingRecorder(model.backbone) as recorder:
            sample = inference_detector(model, image)
        draw_image(ax, image[..., ::-1], sample, recorder, dataset.metainfo['classes'], args)
    figure.suptitle('Detections, and where the deformable layers look (+ centre; darker is heavier)')
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    sys.exit(run(main))
