# SPDX-License-Identifier: Apache-2.0
"""Time Faster R-CNN R50 with DCNv2 in c3-c5 at 800 x 1344: on mmdcn, on mmcv, and with plain convolutions."""

import argparse

import torch
from measure import compiled_mmcv_ops, machine, measure
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from tabulate import tabulate
from torch import Tensor, nn

SIZE = (800, 1344)
LAYERS = {'conv': None, 'mmdcn DCNv2': 'mmdcn.DCNv2', 'mmcv DCNv2': 'DCNv2'}


def build(layer: str | None) -> nn.Module:
    cfg = get_config('mmdet::dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py')
    cfg.model.backbone.init_cfg = None
    if layer is None:
        del cfg.model.backbone.dcn
    else:
        cfg.model.backbone.dcn.type = layer
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def sample() -> DetDataSample:
    """Make the ground truth of one image: boxes with a wide range of sizes, as in COCO."""
    torch.manual_seed(0)
    corner, size = torch.rand(12, 2) * 600, torch.logspace(1, 2.5, 12)[:, None].expand(-1, 2)
    boxes = InstanceData(bboxes=torch.cat([corner, corner + size], 1), labels=torch.randint(80, (12,)))
    meta = dict(img_shape=SIZE, ori_shape=SIZE, batch_input_shape=SIZE, scale_factor=(1.0, 1.0), pad_shape=SIZE)
    return DetDataSample(gt_instances=boxes, metainfo=meta)


def train(model: nn.Module, image: Tensor, data_sample: DetDataSample) -> None:
    model.train()
    model.zero_grad()
    losses = model.loss(image, [data_sample])
    values = [value for loss in losses.values() for value in (loss if isinstance(loss, list) else [loss])]
    sum(value.mean() for value in values if value.requires_grad).backward()


@torch.no_grad()
def test(model: nn.Module, image: Tensor, data_sample: DetDataSample) -> None:
    model.eval()
    model.predict(image, [data_sample])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='the number of CPU threads')
    parser.add_argument('--repeats', type=int, default=5, help='the number of timings of each model')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compiled_mmcv_ops()
    register_all_modules()
    print(tabulate(machine('cpu', ('torch', 'onedl-mmcv', 'onedl-mmdetection')).items(), tablefmt='github'))
    image, data_sample = torch.randn(1, 3, *SIZE), sample()
    models = {name: build(layer) for name, layer in LAYERS.items()}
    lines = []
    for title, step in {'training iteration': train, 'inference': test}.items():
        calls = {name: (lambda m=model, s=step: s(m, image, data_sample)) for name, model in models.items()}
        results = measure(calls, 'cpu', args.repeats, memory=False)
        base = results['conv'].median
        lines.append([title, *(f'{m.median / base:.2f} ({m.median:.2f} s ±{m.spread:.0%})' for m in results.values())])
    print(f'\nTime / conv\n\n{tabulate(lines, headers=["", *models], tablefmt="github", disable_numparse=True)}')


if __name__ == '__main__':
    main()
