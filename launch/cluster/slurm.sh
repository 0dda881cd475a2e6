#!/usr/bin/env bash
# A run over several nodes under Slurm, one task per GPU:
#
#   sbatch --nodes 2 launch/cluster/slurm.sh launch/cpt.py --config ds_configs/zero2.json --recipe my.yaml
#
# Submit it from the project's folder, which all nodes share; docs/clusters.md has the rest. Ten
# minutes before the time limit the ranks get SIGTERM, save and exit with 75; the job is then queued
# again and continues. So does it after a node failure, from the last checkpoint.
#SBATCH --job-name=migu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

if [ $# -eq 0 ]; then
  echo "error: say what to run: sbatch launch/cluster/slurm.sh launch/cpt.py --recipe my.yaml" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}" || exit
[ -d .venv ] && PATH=$PWD/.venv/bin:$PATH
set -a
# shellcheck source=environment
. launch/cluster/environment
set +a
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
export MASTER_ADDR MASTER_PORT

# --kill-on-bad-exit=0 and --wait: a rank that has saved and left does not end those that still save.
# From 22.05 on srun does not take the cores of a task from sbatch by itself.
# shellcheck disable=SC2016
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=300 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE LOCAL_SIZE=$SLURM_NTASKS_PER_NODE
  exec python3 "$@"' ranks "$@"
code=$?

if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
