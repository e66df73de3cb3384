#!/usr/bin/env bash
# Train with torchrun: run this script on every host with the same arguments.
#
#   NNODES=2 MASTER_ADDR=gpu-node-1 launch/torchrun.sh CONFIG RUN [KEY=VALUE...]
#
# NPROC: ranks on this host (default: one per GPU). SIGTERM saves a checkpoint after the current step and ends the run;
# GRACE: seconds that the ranks have for it. Resumes from the last complete checkpoint of RUN. torchrun itself waits 5
# minutes for a network that is down, or for a lost first host; its default would end the ranks after one minute.
set -euo pipefail
config=$1 run=$2
shift 2
resume=()
if compgen -G "$run/checkpoint-*" >/dev/null; then resume=(--resume); fi
exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${NPROC:-gpu}" --shutdown_timeout "${GRACE:-120}" \
    --rdzv_backend c10d --rdzv_id "${JOB:-allinone}" --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" \
    --rdzv_conf read_timeout=300 \
    -m allinone_ds.train "$config" "output_dir=$run" "$@" "${resume[@]}"
