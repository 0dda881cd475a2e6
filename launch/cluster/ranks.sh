#!/usr/bin/env bash
# Start this node's share of a run: one process per GPU.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=first-node launch/cluster/ranks.sh launch/cpt.py --recipe my.yaml
#
# Unlike torchrun and the deepspeed launcher it passes SIGTERM on and waits as long as the ranks take
# to save, and it ends with their exit code, by which a scheduler knows whether to start again (75).
# PROCESSES: how many on this node (default: its GPUs, or 1). MASTER_PORT: default 29500.
set -uo pipefail

processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$processes" -ge 1 ] || processes=1
nodes=${NODES:-1} node=${NODE_RANK:-0}
if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  echo "error: NODES=$nodes needs MASTER_ADDR, the address of the node of NODE_RANK=0" >&2
  exit 2
fi
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=$((nodes * processes)) LOCAL_WORLD_SIZE=$processes LOCAL_SIZE=$processes

ranks=()
for ((local = 0; local < processes; local++)); do
  RANK=$((node * processes + local)) LOCAL_RANK=$local "${PYTHON:-python3}" "$@" &
  ranks+=($!)
done

trap 'kill -TERM "${ranks[@]}" 2>/dev/null' TERM INT USR1

# `wait` comes back early for every signal that is passed on; asked again, it tells how a rank ended.
# The first failure that is not 75 (saved, start again) is the one to report.
code=0
for rank in "${ranks[@]}"; do
  while kill -0 "$rank" 2>/dev/null; do
    wait "$rank"
  done
  wait "$rank"
  ended=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; then
    [ "$ended" -eq 0 ] || code=$ended
  fi
done
exit "$code"
