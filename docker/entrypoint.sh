#!/bin/sh
# Without a command: what this image holds. `health`: for HEALTHCHECK. Else run the command.
set -eu
case ${1-} in
  health)
    python -c 'import pipeline.recipe'
    if [ -e /dev/nvidiactl ]; then nvidia-smi --list-gpus; fi
    ;;
  '' | -h | --help)
    cat <<'TEXT'
Continual pretraining and fine-tuning with MIGU, DeepSpeed and FSDP2, measured after every stage.

  docker run --rm IMAGE make demo                     small runs and a page, without a GPU
  docker run --rm IMAGE migu recipes                  what --recipe takes
  docker run --gpus all --ipc=host -v "$PWD/runs:/opt/migu/runs" IMAGE \
      deepspeed launch/cpt.py --config ds_configs/zero2.json --recipe demo

Mount a folder on /opt/migu/runs to keep what runs write; --user "$(id -u):0" makes it yours. Mount
one on /home/migu/.cache to keep downloads and prepared corpora. --ipc=host (or --shm-size 16g) gives
NCCL shared memory. Several nodes: launch/cluster/, docs/clusters.md.

Programs that a model wrote (HumanEval) run under Landlock and seccomp. For namespaces as well,
--security-opt seccomp=unconfined --security-opt apparmor=unconfined lets bubblewrap make them.

TEXT
    exec migu
    ;;
  *) exec "$@" ;;
esac
