_base_ = [
    '../_base_/models/faster-rcnn_r18-w32_fpn.py',
    '../_base_/datasets/neon_trees.py',
    '../_base_/schedules/schedule_6e.py',
    '../_base_/default_runtime.py',
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=1)))
