# The platform, with the same pinned lock as `make`. The image contains the code, because Serve and jobs import it.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/falaj
ARG TORCH=cpu
COPY requirements.lock requirements-${TORCH}.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock \
    && pip install --no-cache-dir --no-deps --requirement requirements-${TORCH}.lock
COPY pyproject.toml README.md ./
COPY cluster cluster
COPY feature_jobs feature_jobs
COPY jobs jobs
COPY serve_apps serve_apps
COPY configs configs
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home falaj \
    && mkdir /data && chown falaj /data

USER falaj
WORKDIR /data
ENV FALAJ_PROJECT_ROOT=/data
HEALTHCHECK --interval=10s --start-period=60s CMD python -m cluster.status
CMD ["sh", "-c", "python -m cluster.up && exec sleep infinity"]
