#!/usr/bin/env bash
# Train with several processes: tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]
# On several machines, also set NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
config=$1 processes=$2
shift 2
torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@" || {
  echo 'error: a process failed and ended the run, see "Root Cause" above.' \
    'Add --resume to the same command to resume from the last checkpoint' >&2
  exit 1
}
