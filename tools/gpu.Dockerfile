# Trainer, SGLang server and Transformer Engine, in the versions of requirements-gpu.lock:
#
#   docker build -f tools/gpu.Dockerfile -t peergrad .
#
# It is beside the script that it runs, which does the same without a container.
ARG CUDA=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${CUDA}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git libnuma1 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/peergrad
COPY pyproject.toml README.md LICENSE requirements-gpu.lock ./
COPY src src
COPY conf conf
COPY slurm slurm
COPY tools tools
ARG MAX_JOBS=8
RUN python3.12 -m venv /opt/venv \
    && PIP_NO_CACHE_DIR=1 MAX_JOBS=${MAX_JOBS} tools/setup_gpu.sh /opt/venv/bin/python
ENV PATH=/opt/venv/bin:${PATH}
