# The platform, with the packages of the locks. `make image` builds it without a Docker daemon and without a registry.
# The image contains the code, because Serve's replicas and jobs import it. It contains no state and no secret.
ARG BASE=docker.io/library/debian:bookworm-slim
FROM ${BASE}

# DeepSpeed compiles an operator when a training starts: that takes g++, and Python.h of python3-dev. tini is the
# container's first process: it passes signals on and removes ended processes. Debian's security updates replace
# versions, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /data falaj \
    && install --directory --owner=falaj --group=falaj --mode=0700 /data

WORKDIR /opt/falaj
ENV PATH=/opt/falaj/venv/bin:$PATH
ARG TORCH=cpu
COPY requirements.lock requirements-${TORCH}.lock ./
# The secret `pip` is a pip.conf, for a package index of your own. The layer does not contain it.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv venv \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock \
    && pip install --no-cache-dir --no-deps --requirement requirements-${TORCH}.lock
COPY pyproject.toml README.md ./
COPY cluster cluster
COPY feature_jobs feature_jobs
COPY jobs jobs
COPY serve_apps serve_apps
COPY configs configs
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps . \
    && rm -rf build falaj.egg-info cluster feature_jobs jobs serve_apps configs

# The root file system may be read-only. All state and all caches are below /data, all sockets below /tmp.
ENV FALAJ_PROJECT_ROOT=/data HOME=/data PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /data
VOLUME /data
EXPOSE 8443
USER 1000:1000
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s CMD ["python", "-m", "cluster.status"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "cluster.supervisor.container", "cluster.edge_host=0.0.0.0"]
