#!/usr/bin/env bash
# Test with Slurm: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
# tools/slurm.sh lists the environment variables that set the number of machines and GPUs.
set -euo pipefail
tools=$(dirname "$0") partition=$1 job_name=$2 config=$3 checkpoint=$4
shift 4
exec "$tools/slurm.sh" "$partition" "$job_name" \
  "$tools/dist_test.sh" "$config" "$checkpoint" "${GPUS_PER_NODE:-8}" "$@"
