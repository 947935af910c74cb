_base_ = './faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py'
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))  # DCNv2, section 3.2
