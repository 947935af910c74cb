_base_ = 'mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py'
custom_imports = dict(imports=['mmdcn.overrides_everywhere'])
