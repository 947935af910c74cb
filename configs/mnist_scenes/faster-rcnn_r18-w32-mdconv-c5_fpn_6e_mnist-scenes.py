_base_ = './faster-rcnn_r18-w32_fpn_6e_mnist-scenes.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCNv2', deform_groups=1), stage_with_dcn=(False, False, False, True)))
