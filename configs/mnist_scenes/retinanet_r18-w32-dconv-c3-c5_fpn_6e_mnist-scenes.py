_base_ = './retinanet_r18-w32_fpn_6e_mnist-scenes.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCN', deform_groups=1), stage_with_dcn=(False, True, True, True)))
