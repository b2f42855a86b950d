# Two targets from one file:
#
#   docker build --target gpu -t synthia-vllm .        on the official vLLM image (the default)
#   docker build --target cpu -t synthia-vllm:cpu .    for machines without a GPU
#
# Both run as a user without rights. /cache holds what should survive a restart: weights from the
# hub, the demo model, compiled kernels. The root file system can be read-only:
#
#   docker run --gpus all --ipc=host -p 8000:8000 -v synthia-cache:/cache \
#       --read-only --tmpfs /tmp synthia-vllm
#
# `docker stop` sends SIGTERM, and the server then lets running answers finish: give it longer than
# shutdown_grace_seconds (`docker stop -t 60`). `make check-image` builds and tries the second.

ARG VLLM_VERSION=0.32.0
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS cpu
ARG VLLM_VERSION
# libnuma: vLLM's CPU worker binds its memory with it. g++: torch compiles kernels with it when
# `enforce_eager: false` is set. A virtual environment: on an image with Debian's own Python pip
# would refuse to write anywhere else.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/synthia
ENV PATH=/opt/synthia/bin:$PATH
RUN pip install --no-cache-dir --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
        "torch==2.13.0+cpu"
WORKDIR /app
COPY requirements/cpu.txt ./requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY synthia_vllm ./synthia_vllm
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
RUN useradd --uid 10001 --create-home synthia && install -d -o synthia /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SYNTHIA_HOST=0.0.0.0
USER 10001
VOLUME /cache
EXPOSE 8000
# Alive is enough here: whether it takes requests, too, is for /ready and an orchestrator.
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SYNTHIA_PORT', 8000)}/health\")"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["synthia-vllm"]
CMD ["serve"]

FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
WORKDIR /app
COPY requirements/gpu.txt ./requirements/
COPY pyproject.toml README.md LICENSE ./
COPY synthia_vllm ./synthia_vllm
# The image has vLLM and, with it, nearly all that we need: its versions stay as they are. What it
# lacks comes as it is locked; as constraints, which pip takes without their hashes.
RUN python3 -m pip list --format=freeze | sed -E 's/[ =].*//; s/[_.]/-/g; s/.*/^&==/' >present \
    && grep -oE '^[a-zA-Z0-9._-]+==[^ ]+' requirements/gpu.txt | grep -viEf present >constraints \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir -c constraints . \
    && rm present constraints
RUN useradd --uid 10001 --create-home synthia && install -d -o synthia /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SYNTHIA_HOST=0.0.0.0
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SYNTHIA_PORT', 8000)}/health\")"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["synthia-vllm"]
CMD ["serve"]
