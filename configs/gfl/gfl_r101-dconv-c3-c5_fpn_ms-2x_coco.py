_base_ = 'mmdet::gfl/gfl_r101-dconv-c3-c5_fpn_ms-2x_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN')))
