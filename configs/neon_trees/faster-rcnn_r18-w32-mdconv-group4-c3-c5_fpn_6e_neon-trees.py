_base_ = './faster-rcnn_r18-w32_fpn_6e_neon-trees.py'
model = dict(backbone=dict(dcn=dict(type='mmdcn.DCNv2', deform_groups=4), stage_with_dcn=(False, True, True, True)))
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))  # DCNv2, section 3.2
