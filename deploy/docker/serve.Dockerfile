# The endpoint: `dllm serve`, or a node of the Ray cluster that serves. Built from the repository's root:
#
#   docker build -f deploy/docker/serve.Dockerfile --target cuda -t registry.example.com/dllm-serve:0.1.0 .

# Ray refuses a node whose Python differs from the head's, be it in the last digit: all images take theirs from here.
ARG PYTHON_VERSION=3.11.15
# That of torch's wheels, which bring CUDA's libraries: of the images `base` is enough, and lets older drivers run it.
ARG CUDA_VERSION=13.0.3

FROM python:${PYTHON_VERSION}-slim-bookworm AS python

FROM python AS builder
ARG UV_VERSION=0.13.9
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    VIRTUAL_ENV=/opt/venv
RUN pip install --no-cache-dir --disable-pip-version-check uv==${UV_VERSION}
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/docker/install.sh ./

# TORCH_INDEX: where to take torch from. Without it uv knows where CPU wheels are, and the usual index has CUDA's.
FROM builder AS venv-cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=""
RUN --mount=type=cache,target=/root/.cache/uv sh install.sh cpu

FROM builder AS venv-cuda
ARG CUDA_VERSION
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=""
RUN --mount=type=cache,target=/root/.cache/uv sh install.sh "${CUDA_VERSION}"

# Apart from what it needs, to be laid over it: new code is then a layer of some MB, not of GB.
FROM builder AS code
COPY README.md LICENSE ./
COPY dllm_core dllm_core
COPY workflows workflows
RUN --mount=type=cache,target=/root/.cache/uv uv venv "${VIRTUAL_ENV}" \
    && uv pip install --no-deps --prefix /opt/dllm .

FROM python AS cpu
# Ray's launcher comes by rsync, KubeRay's probes are wget; nothing is compiled here.
# No versions: Debian's mirrors keep the newest alone, so a pin is a build that soon fails. The base image is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends rsync wget \
    && rm -rf /var/lib/apt/lists/*
# A login shell, which is what Ray's launcher and KubeRay start, forgets the PATH below.
RUN groupadd --gid 1000 dllm \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp/home --no-create-home --shell /bin/bash dllm \
    && install -d -o 1000 -g 1000 /tmp/home /tmp/home/.ray \
    && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/dllm.sh
COPY --from=venv-cpu /opt/venv /opt/venv
COPY --from=code /opt/dllm /opt/venv
# The root filesystem may be read-only: /tmp is all that is written to.
ENV HF_HUB_DISABLE_TELEMETRY=1 \
    HOME=/tmp/home \
    PATH=/opt/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.25 \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_USE_GRPC_BY_DEFAULT=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VIRTUAL_ENV=/opt/venv
# Tokenizers are no tokens of access.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
WORKDIR /tmp
USER 1000:1000
# What was built also runs: Python finds its libraries, a login shell finds the commands.
RUN python -c "import bz2, ctypes, lzma, readline, sqlite3, ssl, uuid, zlib" \
    && bash --login -c "ray --version && dllm --help" > /dev/null
EXPOSE 8000
# Where the image is a node and not the endpoint, Kubernetes leaves this out, and Ray's launcher does not ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dllm"]
CMD ["serve", "--help"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dllm-serve" \
      org.opencontainers.image.description="Diffusion language models: the endpoint, CPU" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04 AS cuda
# Besides what the CPU image has: a C compiler, with which torch.compile makes kernels when a model is loaded, and the
# libraries of Python's own modules. Ubuntu's Python is another version; Debian's build runs here because this glibc is
# newer than the one that it was linked with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev rsync wget \
        ca-certificates libbz2-1.0 libffi8 liblzma5 libncursesw6 libreadline8t64 libsqlite3-0 libssl3t64 libuuid1 \
        netbase zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=python /usr/local/bin/python3.11 /usr/local/bin/
COPY --from=python /usr/local/include /usr/local/include
COPY --from=python /usr/local/lib /usr/local/lib
# Ubuntu's image has a user 1000 of its own.
RUN ldconfig \
    && userdel --remove ubuntu \
    && groupadd --gid 1000 dllm \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp/home --no-create-home --shell /bin/bash dllm \
    && install -d -o 1000 -g 1000 /tmp/home /tmp/home/.ray \
    && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/dllm.sh
COPY --from=venv-cuda /opt/venv /opt/venv
COPY --from=code /opt/dllm /opt/venv
ENV HF_HUB_DISABLE_TELEMETRY=1 \
    HOME=/tmp/home \
    PATH=/opt/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.25 \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_USE_GRPC_BY_DEFAULT=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VIRTUAL_ENV=/opt/venv
# Tokenizers are no tokens of access.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
WORKDIR /tmp
USER 1000:1000
RUN python -c "import bz2, ctypes, lzma, readline, sqlite3, ssl, uuid, zlib" \
    && bash --login -c "ray --version && dllm --help" > /dev/null
EXPOSE 8000
# Where the image is a node and not the endpoint, Kubernetes leaves this out, and Ray's launcher does not ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dllm"]
CMD ["serve", "--help"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dllm-serve" \
      org.opencontainers.image.description="Diffusion language models: the endpoint, CUDA" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
