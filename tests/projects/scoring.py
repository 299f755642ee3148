"""A project for load tests. Two versions of its model run behind the edge, and read 16 features by `account_id`.

The project runs the same commands as a user. Only the model is fitted here, because training is not tested.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightgbm as lgb
import numpy as np
import polars as pl

from cluster.registry import Lineage, Registry
from cluster.runtime.signature import LIGHTGBM_FILE, SIGNATURE_FILE, InputSpec, ModelSignature, Task
from cluster.security.keys.access import key_store
from cluster.storage import layout
from feature_jobs.store.catalog.specifications import service_spec
from tests.integration.conftest import Project, exports, new_project

MODEL, SERVICE = "score", "scoring"
PREDICT = f"/v1/models/{MODEL}:predict"
ACCOUNTS, FEATURES = 2_000, 16
DEFINITIONS = f"""
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource

account = Entity("account", join_keys=["account_id"])
usage = FeatureView(
    "usage",
    entities=[account],
    source=FileSource("usage.parquet", event_timestamp="at"),
    schema=[Field(f"f{{number}}", "float64") for number in range({FEATURES})],
)
scoring = FeatureService("{SERVICE}", views=[usage])
"""


def features() -> np.ndarray:
    """Return the features of all accounts, float64 [accounts, features]."""
    return np.random.default_rng(0).normal(size=(ACCOUNTS, FEATURES))


def write_model(folder: Path, *, seed: int, service_version: str = "") -> None:
    """Write a small model as a folder of model files."""
    inputs = features()
    label = inputs[:, 0] + inputs[:, 1] * inputs[:, 2] > 0
    parameters = {"objective": "binary", "num_leaves": 15, "num_threads": 1, "verbose": -1, "seed": seed}
    booster = lgb.train(
        parameters | {"bagging_fraction": 0.5, "bagging_freq": 1}, lgb.Dataset(inputs, label), 40
    )
    signature = ModelSignature(
        task=Task.binary,
        inputs=tuple(InputSpec(name=f"usage__f{number}", dtype="double") for number in range(FEATURES)),
        label="label",
        classes=(0, 1),
        service=SERVICE if service_version else "",
        service_version=service_version,
    )
    folder.mkdir(parents=True)
    booster.save_model(folder / LIGHTGBM_FILE)
    (folder / SIGNATURE_FILE).write_text(signature.to_json())


def prepare(project: Project, *, versions: int = 2) -> None:
    """Put features online and register model versions. The cluster of the project must be running."""
    (project.root / "scoring.py").write_text(DEFINITIONS)
    columns = {f"f{number}": column for number, column in enumerate(features().T)}
    at = pl.lit("2026-01-01").str.to_datetime(time_unit="us", time_zone="UTC")
    frame = pl.DataFrame({"account_id": np.arange(ACCOUNTS), **columns}).with_columns(at=at)
    frame.write_parquet(project.root / "usage.parquet")
    project.run("feature_jobs.apply", "definitions=scoring", check=True)
    project.run("feature_jobs.ingest", "definitions=scoring", "view=usage", check=True)
    project.run("feature_jobs.materialize", "definitions=scoring", "view=usage", check=True)
    for number in range(versions):
        register(project, seed=number)


def register(project: Project, *, seed: int) -> int:
    """Register another version of the model, and return its number."""
    ledger = project.ledger()
    spec = service_spec(ledger, SERVICE)
    folder = project.root / f"model-{seed}"
    write_model(folder, seed=seed, service_version=spec.version)
    version = Registry(ledger, layout(project.config.storage)).register(
        folder,
        name=MODEL,
        family="lightgbm",
        task=Task.binary.value,
        lineage=Lineage(training_set_hash="", service=SERVICE, service_version=spec.version),
        metrics={},
        store=key_store(project.owner),
        actor="t",
    )
    return version.version


def serve(project: Project, *overrides: str, weight: float = 50.0) -> None:
    """Deploy the first version as champion, and start a rollout that gives the second version `weight` % of units."""
    project.run("serve_apps.deploy", f"name={MODEL}", "version=1", *overrides, check=True)
    start = ("action=start", f"name={MODEL}", "version=2", f"weight={weight}")
    project.run("serve_apps.rollout", *start, *overrides, check=True)


@contextlib.contextmanager
def new_cluster() -> Iterator[Project]:
    """Run a new cluster in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="falaj-scoring-") as name:
        project = new_project(Path(name))
        project.up()
        try:
            project.env.update(exports(project.run("cluster.status", "--env", check=True).stdout))
            yield project
        finally:
            project.run("cluster.down")


@contextlib.contextmanager
def running_project(*overrides: str, weight: float = 50.0) -> Iterator[Project]:
    """Run a new cluster in a temporary folder. It serves both versions."""
    with new_cluster() as project:
        prepare(project)
        serve(project, *overrides, weight=weight)
        yield project
