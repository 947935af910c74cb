_base_ = 'mmdet::vfnet/vfnet_res2net101-mdconv-c3-c5_fpn_ms-2x_coco.py'
custom_imports = dict(imports=['mmdcn.overrides_everywhere'])
