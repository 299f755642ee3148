"""A project of a user, from an empty folder to a served model.

The project has its own data, definitions and configuration, and changes no file of this repository.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from tests.integration.client import Client

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from datetime import timedelta
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, NotNull, Range

customer = Entity("customer", join_keys=["customer_id"])
income = FeatureView(
    "income",
    entities=[customer],
    ttl=timedelta(days=365),
    source=FileSource("incomes.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64"), Field("sector", "string")],
    checks=[NotNull("amount"), Range("amount", minimum=0)],
)
credit = FeatureService("credit", views=[income])
"""
MODEL = """
family: lightgbm
rounds: 40
min_data_in_leaf: 5
num_threads: 1
"""
NUM_CUSTOMERS = 400
PREDICT = "/v1/models/loan:predict"
AS_OF = "2024-06-01T00:00:00Z"
SPLIT = ("split.column=customer_id", "split.modulo=4", "split.remainder=3")
DATA = ("name=loan", "training_set=loans.parquet", "label=repaid")
TRAIN = ("--config-dir", "conf", "model=small", *DATA, *SPLIT)
"""Arguments of `jobs.train`."""


class Commands(Protocol):
    """A folder, and a function that runs the platform's commands in it."""

    @property
    def root(self) -> Path: ...

    def run(self, module: str, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]: ...


class Shop(Client):
    """A client that requests loan predictions for a customer."""

    def predict(self, customer: int, **more: Any) -> tuple[int, dict[str, Any]]:
        body = {"entities": [{"customer_id": customer}], "as_of": AS_OF, **more}
        return self.call(PREDICT, body, unit=str(customer))


def prepare(project: Commands) -> None:
    """Apply, ingest, train and deploy. The cluster of the project must be running."""
    register(project)
    project.run("serve_apps.deploy", "name=loan", "version=1", check=True)


def register(project: Commands) -> None:
    """Apply, ingest, materialise, and train version 1."""
    root, run = project.root, project.run
    (root / "loans.py").write_text(DEFINITIONS)
    (root / "conf" / "model").mkdir(parents=True)
    (root / "conf" / "model" / "small.yaml").write_text(MODEL)
    write_data(root)
    run("feature_jobs.apply", "definitions=loans", check=True)
    run("feature_jobs.ingest", "definitions=loans", "view=income", check=True)
    training = ("service=credit", "entities=customers.parquet", "output=loans.parquet")
    run("feature_jobs.training_set", "definitions=loans", *training, check=True)
    run("feature_jobs.materialize", "definitions=loans", "view=income", f"as_of={AS_OF}", check=True)
    run("jobs.train", *TRAIN, check=True)


def write_data(root: Path) -> None:
    ids = list(range(NUM_CUSTOMERS))
    amounts = [float(number * 37 % 101) for number in ids]
    frame = pl.DataFrame(
        {
            "customer_id": ids,
            "at": ["2024-01-01T00:00:00"] * len(ids),
            "amount": amounts,
            "sector": ["farm" if number % 3 else "shop" for number in ids],
        }
    ).with_columns(pl.col("at").str.to_datetime(time_unit="us", time_zone="UTC"))
    frame.write_parquet(root / "incomes.parquet")
    people = frame.select(
        "customer_id", event_timestamp=pl.lit("2024-03-01").str.to_datetime(time_unit="us", time_zone="UTC")
    )
    people.with_columns(repaid=(frame["amount"] > 50).cast(pl.Int64)).write_parquet(
        root / "customers.parquet"
    )


def log(project: Project) -> Path:
    """Return the folder of the prediction log."""
    return project.storage_root / "predictions" / "loan"
