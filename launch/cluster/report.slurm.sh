#!/usr/bin/env bash
# Evaluate what has been published and rebuild the pages, after a run:
#
#   sbatch --dependency=afterany:JOB launch/cluster/report.slurm.sh runs/
#SBATCH --job-name=migu-report
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[ -d .venv ] && PATH=$PWD/.venv/bin:$PATH
set -a
# shellcheck source=environment
. launch/cluster/environment
set +a
exec python3 launch/report.py due --root "${1:-runs/}" --budget 3h
