#!/usr/bin/env bash
# Train on the hosts of a hostfile: the DeepSpeed launcher starts the ranks over ssh (pdsh). Run it on the first host.
#
#   launch/ssh.sh HOSTFILE CONFIG RUN [KEY=VALUE...]
#
# All hosts need the same Python at the same path, the data, and RUN on a shared file system. Environment variables of
# the ranks belong in ./.deepspeed_env (see deepspeed_env.example). Resumes from the last complete checkpoint of RUN.
set -euo pipefail
hostfile=$1 config=$2 run=$3
shift 3
first=$(awk '!/^#/ && NF {print $1; exit}' "$hostfile")
for file in .deepspeed_env ~/.deepspeed_env; do
    # the launcher writes these lines to its log and on the ssh command lines
    if [[ -f $file ]] && grep -qiE '^[^=]*(key|token|secret|password)[^=]*=' "$file"; then
        echo "error: $file holds a key: remove it, and use \`wandb login\` and \`hf auth login\` on the hosts instead" >&2
        exit 2
    fi
done
resume=()
if compgen -G "$run/checkpoint-*" >/dev/null; then resume=(--resume); fi
exec deepspeed --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" \
    --module allinone_ds.train "$config" "output_dir=$run" "$@" "${resume[@]}"
