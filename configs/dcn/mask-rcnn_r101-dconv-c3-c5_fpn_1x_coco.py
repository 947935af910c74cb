_base_ = 'mmdet::dcn/mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN')))
