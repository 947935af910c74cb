_base_ = 'mmdet::dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py'
model = dict(roi_head=dict(bbox_roi_extractor=dict(type='mmdcn.SingleRoIExtractor')))
