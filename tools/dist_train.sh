#!/usr/bin/env bash
# Train on several processes: tools/dist_train.sh CONFIG PROCESSES [the options of tools/train.py]
# On several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT as well.
set -euo pipefail
config=$1 processes=$2
shift 2
torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@" || {
  echo 'error: a process failed, which ended the run: "Root Cause" above names it.' \
    'With --resume the same command goes on from the last checkpoint' >&2
  exit 1
}
