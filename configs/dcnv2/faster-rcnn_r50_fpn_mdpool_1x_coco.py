_base_ = 'mmdet::dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py'
model = dict(roi_head=dict(bbox_roi_extractor=dict(type='mmdcn.SingleRoIExtractor')))
