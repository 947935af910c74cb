_base_ = 'mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py'
custom_imports = dict(imports=['mmdcn.overrides'])
