_base_ = 'mmdet::gfl/gfl_x101-32x4d-dconv-c4-c5_fpn_ms-2x_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN')))
