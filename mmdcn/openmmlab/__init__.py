# SPDX-License-Identifier: Apache-2.0
"""What turns OpenMMLab's own configs, code and models over to mmdcn.

| File | What it changes |
|---|---|
| `registered_names.py` | what `DCN` and `DCNv2` mean in mmdet's registry |
| `imported_names.py` | what mmdet's modules have imported from `mmcv.ops` |
| `convert_model.py` | the layers of a built model |
| `counterparts.py` | nothing: it lists what mmdcn has for each layer and function of mmcv |
| `mmcv_ext.py` | nothing: it has the functions of mmcv's compiled operators |
| `switches.py` | the first two, by `patch_mmdet`, `unpatch_mmdet`, `mmdcn.overrides` and `mmdcn.overrides_everywhere` |
"""
