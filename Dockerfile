# The whole platform in one container, from the same pinned lock as `make install`:
#     docker run --network=host --shm-size=2g --volume falaj:/project falaj
# The edge listens on loopback, hence the host's network; Ray's object store lives in /dev/shm.
FROM python:3.11-slim

# g++: DeepSpeed compiles an operator at start. libgomp: LightGBM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/falaj
COPY requirements.lock ./
RUN pip install --no-cache-dir --requirement requirements.lock

COPY pyproject.toml README.md ./
COPY cluster cluster
COPY feature_jobs feature_jobs
COPY jobs jobs
COPY serve_apps serve_apps
COPY configs configs
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 10001 falaj && install --directory --owner=falaj /project
USER falaj
WORKDIR /project
VOLUME /project
ENV PYTHONUNBUFFERED=1

HEALTHCHECK --interval=10s --timeout=5s --start-period=90s \
    CMD ["python", "-m", "cluster.status", "--json"]

# `up` starts the cluster's processes and returns; the shell stays as the container's first process and ends them on SIGTERM.
CMD ["bash", "-c", "trap 'python -m cluster.down; exit 0' TERM INT; python -m cluster.up || exit; while :; do sleep 5 & wait $!; done"]
