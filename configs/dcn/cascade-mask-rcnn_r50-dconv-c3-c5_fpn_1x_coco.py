_base_ = 'mmdet::dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN')))
