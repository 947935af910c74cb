#!/usr/bin/env bash
# Train with Slurm: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
# tools/slurm.sh lists the environment variables that set the number of machines and GPUs.
set -euo pipefail
tools=$(dirname "$0") partition=$1 job_name=$2 config=$3 work_dir=$4
shift 4
exec "$tools/slurm.sh" "$partition" "$job_name" \
  "$tools/dist_train.sh" "$config" "${GPUS_PER_NODE:-8}" --work-dir "$work_dir" "$@"
