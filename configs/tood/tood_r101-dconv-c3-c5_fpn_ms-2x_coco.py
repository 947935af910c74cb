_base_ = 'mmdet::tood/tood_r101-dconv-c3-c5_fpn_ms-2x_coco.py'
custom_imports = dict(imports=['mmdcn.overrides_everywhere'])
