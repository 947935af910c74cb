# Any COCO config on the five photographs of tools/dataset_converters/coco_tiny.py, small and for two epochs:
# COCO_CONFIG=vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco python tools/train.py configs/coco_tiny/coco_tiny.py
_base_ = '../{{$COCO_CONFIG:dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco}}.py'
data_root = 'data/coco_tiny/'
work_dir = 'work_dirs/coco_tiny/{{$COCO_CONFIG:dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco}}'

size = (160, 128)
small = dict(batch_size=2, num_workers=0, persistent_workers=False, times=1, crop_size=size)


def shrink(node):
    """Return a copy of a part of the config with the small data, images and batches."""
    if isinstance(node, str):
        return node.replace('data/coco/', data_root)
    if isinstance(node, list | tuple):
        return type(node)(map(shrink, node))
    if not isinstance(node, dict):
        return node
    copy = {key: small.get(key, shrink(value)) for key, value in node.items()}
    for key in {'scale', 'scales'} & set(node):
        copy[key] = [size] * len(node[key]) if isinstance(node[key], list) else size
    return copy


train_dataloader = shrink(_base_.train_dataloader)
val_dataloader = shrink(_base_.val_dataloader)
test_dataloader = shrink(_base_.test_dataloader)
val_evaluator = shrink(_base_.val_evaluator)
test_evaluator = shrink(_base_.test_evaluator)

model = dict(backbone=dict(init_cfg=[]))  # nothing to download; None would redraw the offsets of a Res2Net
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
