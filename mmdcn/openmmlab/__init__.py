# SPDX-License-Identifier: Apache-2.0
"""Switch OpenMMLab's own configs, code and models to mmdcn.

| File | What it does |
|---|---|
| `registered_names.py` | replaces `DCN` and `DCNv2` in mmdet's registry |
| `imported_names.py` | replaces the names that mmdet's modules have imported from `mmcv.ops` |
| `switches.py` | does both: `patch_mmdet`, `unpatch_mmdet`, `mmdcn.overrides`, `mmdcn.overrides_everywhere` |
| `convert_model.py` | converts the layers of a built model |
| `counterparts.py` | lists mmdcn's replacement for each layer and function of mmcv |
| `mmcv_ext.py` | implements mmcv's compiled functions |
"""
