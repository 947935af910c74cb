_base_ = './faster-rcnn_r18-w32_fpn_6e_mnist-scenes.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCNv2', deform_groups=4), stage_with_dcn=(False, True, True, True)))
