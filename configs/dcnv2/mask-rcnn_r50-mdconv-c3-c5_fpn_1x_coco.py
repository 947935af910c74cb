_base_ = 'mmdet::dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCNv2')))
