"""A command imports only the large packages that it uses, because imports are most of the time of a small command."""

from __future__ import annotations

import json
import subprocess
import sys

LARGE = {
    "aiohttp",
    "boto3",
    "confluent_kafka",
    "deepspeed",
    "deltalake",
    "hvac",
    "lightgbm",
    "lmdb",
    "matplotlib",
    "nannyml",
    "numpy",
    "onnx",
    "onnxruntime",
    "pandas",
    "polars",
    "pyarrow",
    "ray",
    "redis",
    "requests",
    "s3fs",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "torch",
}
"""Packages whose import takes more than 20 ms."""
RAY_SERVE = {"aiohttp", "numpy", "pandas", "pyarrow", "ray", "requests", "scipy"}
"""What `ray.serve` imports by itself. It imports pandas if pandas is installed."""
TABLES = {"deltalake", "numpy", "polars", "pyarrow", "sqlalchemy"}
USED = {
    "cluster.up": {"sqlalchemy"},
    "cluster.down": {"sqlalchemy"},
    "cluster.lineage.__main__": {"sqlalchemy"},
    "cluster.supervisor.__main__": {"sqlalchemy"},
    "cluster.security.keys.__main__": {"sqlalchemy"},
    "serve_apps.edge.__main__": {"sqlalchemy"},
    "serve_apps.rollout.__main__": {"sqlalchemy"},
    "serve_apps.rollout.controller.service": {"numpy", "scipy", "sqlalchemy"},
    "serve_apps.deploy": {"sqlalchemy"} | RAY_SERVE,
    "feature_jobs.apply": {"numpy", "pyarrow", "sqlalchemy"},
    "feature_jobs.census": {"numpy", "pyarrow", "sqlalchemy"},
    "feature_jobs.ingest": TABLES,
    "feature_jobs.training_set": TABLES,
    "feature_jobs.materialize": TABLES | {"lmdb"},
    "jobs.train.__main__": {"numpy", "pyarrow", "sqlalchemy"},
    "jobs.monitor.__main__": TABLES,
}
"""The large packages that each command may import when it starts. Other packages are imported where they are used."""


COMMON = "cluster.ledger"
"""All these commands import it. `cluster.status` does not."""


def imported(common: str, *commands: str) -> dict[str, set[str]]:
    """Return the large packages that each command imports when it starts."""
    program = [sys.executable, "-m", "tests.processes.imported_packages", common, *commands]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return {command: LARGE & set(packages) for command, packages in json.loads(done.stdout).items()}


def test_commands_import_only_what_they_use() -> None:
    """No command imports a large package at its start that it needs only in some cases, or never."""
    unused = {command: packages - USED[command] for command, packages in imported(COMMON, *USED).items()}
    assert {command: packages for command, packages in unused.items() if packages} == {}


def test_status_imports_no_large_package() -> None:
    """On one machine, the state of a cluster is read from its processes. The ledger is not needed for it."""
    assert imported("cluster.entrypoint", "cluster.status") == {"cluster.status": set()}


def test_statistics_import_only_numpy_and_scipy() -> None:
    """So a verdict depends on nothing but its arguments."""
    module = "cluster.statistics.verdict"
    assert imported("cluster.errors", module) == {module: {"numpy", "scipy"}}
