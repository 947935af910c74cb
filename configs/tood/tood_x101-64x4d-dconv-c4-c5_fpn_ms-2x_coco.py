_base_ = 'mmdet::tood/tood_x101-64x4d-dconv-c4-c5_fpn_ms-2x_coco.py'
custom_imports = dict(imports=['mmdcn.overrides_everywhere'])
