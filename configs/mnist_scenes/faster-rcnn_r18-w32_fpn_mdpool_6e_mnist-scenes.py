_base_ = './faster-rcnn_r18-w32_fpn_6e_mnist-scenes.py'
model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(
            type='mmdcn.SingleRoIExtractor',
            roi_layer=dict(type='ModulatedDeformRoIPoolPack', output_channels=64, deform_fc_channels=64),
        )
    )
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(offset_fc=dict(lr_mult=0.1))))
