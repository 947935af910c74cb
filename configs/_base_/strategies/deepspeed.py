# Train by DeepSpeed (`pip install mmdcn[deepspeed]`) in the processes of tools/dist_train.sh: name this file in _base_
# beside the detector's config, and set `optim_wrapper = dict(type='DeepSpeedOptimWrapper')`.
# - Stage 0 shards nothing and learns as DDP does. Stages 1 to 3 shard on GPUs; on a CPU DeepSpeed 0.18 fails with them.
# - `optim_wrapper.clip_grad` is an error there: `strategy.gradient_clipping` is DeepSpeed's.
# - A checkpoint is a folder. Of stage 0 the weights are the key 'module' of its mp_rank_00_model_states.pt.
runner_type = 'FlexibleRunner'
strategy = dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=0))
