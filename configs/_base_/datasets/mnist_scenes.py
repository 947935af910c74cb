# Digits of MNIST in scenes of 160 x 160 pixels: python tools/dataset_converters/mnist_scenes.py
dataset_type = 'mmdet.CocoDataset'
data_root = 'data/mnist_scenes/'
metainfo = dict(classes=tuple('0123456789'))

train_pipeline = [
    dict(type='mmdcn.LoadImageFromFile'),
    dict(type='mmdet.LoadAnnotations', with_bbox=True),
    dict(type='mmdet.PackDetInputs'),
]
test_pipeline = [
    dict(type='mmdcn.LoadImageFromFile'),
    dict(type='mmdet.Resize', scale=(160, 160), keep_ratio=True),
    dict(type='mmdet.LoadAnnotations', with_bbox=True),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

# The data is loaded in the main process: it is quick, and runs can be repeated to the bit.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/test.json',
        data_prefix=dict(img='test/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_dataloader = test_dataloader

test_evaluator = dict(type='mmdet.CocoMetric', ann_file=data_root + 'annotations/test.json', metric='bbox')
val_evaluator = test_evaluator
