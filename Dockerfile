# An image for NVIDIA GPUs (A100, H100; the driver must know CUDA 13), which also runs without one:
#
#   docker build -t migu .
#   docker run --rm migu                                     what is inside, and how to start it
#   docker run --rm migu make demo                           no GPU needed
#   docker run --gpus all --ipc=host -v "$PWD/runs:/opt/migu/runs" migu \
#       deepspeed launch/cpt.py --config ds_configs/zero2.json
#
# The CUDA runtime is the one that the pinned torch brings as packages (13.0), so a CUDA base image
# would hold every library twice. Every package is pinned with its hashes (docker/*.lock; `make lock`
# writes them). Python is Debian's 3.11, with which the versions were tested together.
FROM debian:bookworm-slim AS builder

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/build.lock docker/requirements.lock docker/portable-g++ /build/
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --require-hashes --no-deps --requirement /build/build.lock

# nvcc is a package too. DeepSpeed's operators are compiled here, for A100 and H100 and for any
# processor that such machines have, so that no first step of a run waits for a compiler.
ENV CUDA_HOME=/opt/venv/lib/python3.11/site-packages/nvidia/cu13 CXX=/build/portable-g++ \
    DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 TORCH_CUDA_ARCH_LIST="8.0;9.0"
RUN ln -s lib "$CUDA_HOME/lib64" \
    && ln -s libcudart.so.13 "$CUDA_HOME/lib/libcudart.so" \
    && ln -s libcurand.so.10 "$CUDA_HOME/lib/libcurand.so" \
    && ln -s libcublas.so.13 "$CUDA_HOME/lib/libcublas.so" \
    && pip install --require-hashes --no-deps --no-build-isolation \
        --requirement /build/requirements.lock \
    && pip uninstall --yes nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl wheel \
    && find "$VIRTUAL_ENV" -name __pycache__ -type d -prune -exec rm -rf {} +

FROM debian:bookworm-slim

# bubblewrap is the stronger sandbox for generated programs, where the container may make namespaces
# (docs/sandbox.md); Landlock needs nothing. gcc and the headers are for train.compile, whose Triton
# builds its bridge to the driver with them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 make bubblewrap libgomp1 gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/venv /opt/venv

# Group 0 may write what the user may: clusters that choose a number for the user keep that group.
RUN useradd --uid 1000 --gid 0 --create-home migu && chmod g=u /home/migu
WORKDIR /opt/migu
COPY --chown=1000:0 . .
ENV VIRTUAL_ENV=/opt/venv VENV=/opt/venv PATH=/opt/venv/bin:$PATH HOME=/home/migu \
    PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && touch /opt/venv/.installed \
    && mkdir --parents runs \
    && chown -R 1000:0 . \
    && chmod -R g=u .

ARG REVISION=unknown
LABEL org.opencontainers.image.title="migu" \
      org.opencontainers.image.description="Continual pretraining and fine-tuning, measured after every stage" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION"
USER 1000
# A GPU that has fallen off the bus answers nothing; a container without one is well.
HEALTHCHECK --interval=2m --timeout=30s CMD ["docker/entrypoint.sh", "health"]
ENTRYPOINT ["/opt/migu/docker/entrypoint.sh"]
