#!/usr/bin/env bash
# Start a command once on each machine of a new Slurm job: tools/slurm.sh PARTITION JOB_NAME COMMAND [ARGUMENTS]
# Environment variables: GPUS, the number of GPUs (8); GPUS_PER_NODE (8); CPUS_PER_TASK, the cores for each GPU (5);
# SRUN_ARGS, further options of srun. The command gets NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
partition=$1 job_name=$2
shift 2
# shellcheck disable=SC2016,SC2086  # the machines expand the command, and SRUN_ARGS is several words
exec srun --partition="$partition" --job-name="$job_name" --nodes=$((${GPUS:-8} / ${GPUS_PER_NODE:-8})) \
  --ntasks-per-node=1 --gres="gpu:${GPUS_PER_NODE:-8}" --kill-on-bad-exit=1 \
  --cpus-per-task=$((${GPUS_PER_NODE:-8} * ${CPUS_PER_TASK:-5})) ${SRUN_ARGS:-} bash -c '
    export NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID
    export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    exec "$@"' slurm.sh "$@"
