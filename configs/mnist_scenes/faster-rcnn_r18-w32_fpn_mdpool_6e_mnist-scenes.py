_base_ = './faster-rcnn_r18-w32_fpn_dpool_6e_mnist-scenes.py'
model = dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type='ModulatedDeformRoIPoolPack'))))
