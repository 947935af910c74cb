# Shard the parameters over the processes of tools/dist_train.sh: name this file in _base_ beside the detector's config.
# - `optim_wrapper.clip_grad` would bound the norm of each process's shard, not that of all gradients: set it to None.
# - FSDP takes no scalar parameters: the heads with a `Scale` (FCOS, ATSS, GFL, TOOD and their kin) cannot be sharded.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='mmdcn.FSDPStrategy',
    # Each parameter stays one, with its name: `dcn_offset_lr_mult` and all of `paramwise_cfg` need that.
    model_wrapper=dict(type='MMFullyShardedDataParallel', use_orig_params=True),
    # Whole checkpoints, which tools/test.py loads. Nothing is offloaded: on a CPU that is no copy, and torch uses the
    # memory again while it saves, so that `state_dict_cfg='full'` writes wrong momenta, or crashes.
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True, offload_to_cpu=False),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True, offload_to_cpu=False),
    ),
)
