_base_ = 'mmdet::htc/htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400-16xb1-20e_coco.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN')))
