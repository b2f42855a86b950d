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

# Tags can be moved: for builds that are the same each time name both with a digest, too
# (--build-arg VLLM_IMAGE=vllm/vllm-openai:v0.32.0@sha256:...).
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS cpu
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
# What of vLLM's own wants is left out on purpose is in requirements/no-torch.in; all else has to fit.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && pip check | { ! grep -vE 'requires torch(audio|codec|vision), which is not installed'; }
RUN useradd --uid 10001 --create-home synthia && install -d -o synthia /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SYNTHIA_HOST=0.0.0.0
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="synthia-vllm" \
    org.opencontainers.image.description="Synthia-7B-v3.0 for many users, on vLLM" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
USER 10001
VOLUME /cache
EXPOSE 8000
# Alive is enough here: whether it takes requests, too, is for /ready and an orchestrator.
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SYNTHIA_PORT', 8000)}/health\")"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["synthia-vllm"]
CMD ["serve"]

FROM ${VLLM_IMAGE} AS gpu
WORKDIR /app
COPY requirements/gpu.txt ./requirements/
COPY pyproject.toml README.md LICENSE ./
COPY synthia_vllm ./synthia_vllm
# The image has vLLM and, with it, nearly all that we need. What it lacks comes as it is locked; what it
# has stays at its version, and what fitted together still does: else the build fails, and says what.
RUN export LC_ALL=C PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 \
    && python3 -m pip list --format=freeze | sort >before \
    && { python3 -m pip check || true; } | sort >misfits \
    && awk -F '[ =]' 'NR == FNR { gsub(/[_.]/, "-", $1); there[tolower($1)]; next } \
        /^[a-z0-9]/ { lacking = !($1 in there) } lacking' before requirements/gpu.txt >lacking \
    && python3 -m pip install --no-deps --require-hashes -r lacking \
    && python3 -m pip install --no-deps --no-build-isolation . \
    && python3 -m pip list --format=freeze | sort | comm -23 before - | { ! grep .; } \
    && { python3 -m pip check || true; } | sort | comm -13 misfits - | { ! grep -v '^No broken'; } \
    && rm before misfits lacking
RUN useradd --uid 10001 --create-home synthia && install -d -o synthia /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SYNTHIA_HOST=0.0.0.0
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="synthia-vllm" \
    org.opencontainers.image.description="Synthia-7B-v3.0 for many users, on vLLM" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SYNTHIA_PORT', 8000)}/health\")"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["synthia-vllm"]
CMD ["serve"]
