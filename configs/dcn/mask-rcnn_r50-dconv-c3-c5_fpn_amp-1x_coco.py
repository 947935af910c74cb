_base_ = 'mmdet::dcn/mask-rcnn_r50-dconv-c3-c5_fpn_amp-1x_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN')))
