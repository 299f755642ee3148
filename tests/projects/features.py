"""A feature store without a cluster: a ledger, the table of one view, training sets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ledger import Ledger
from cluster.security.keys.access import KeyAccess
from cluster.settings import StorageConfig
from feature_jobs.store import FeatureService, FeatureView, Field, Sensitivity
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import BucketFile, Snapshot, Target
from feature_jobs.training_set import TrainingSetConfig, build_training_set, load_request
from tests.projects.tables import TIME, commit_rows, feature_rows, pin, target_of
from tests.projects.views import apply_service, make_view

START = datetime(2024, 1, 1, tzinfo=UTC)
INCOME = make_view(schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)])
PEOPLE = 20


class FeatureProject:
    """A storage root with a ledger and the table of one view. Its methods run commands without cluster or policies."""

    def __init__(self, root: Path, access: KeyAccess) -> None:
        root.mkdir()
        self.root, self.access = root, access
        self.ledger = Ledger(f"sqlite:///{root}/ledger.db")
        self.uri = f"{root}/features/income"
        self.apply(INCOME)
        self.write_entities(PEOPLE)

    def apply(self, view: FeatureView) -> None:
        apply_service(self.ledger, FeatureService("credit", views=[view]))

    def write_entities(self, count: int) -> None:
        at = pa.array([START + timedelta(days=9)] * count, TIME)
        pq.write_table(
            pa.table({"person_id": range(count), "event_timestamp": at}), self.root / "people.parquet"
        )

    def ingest(self, number: int, **columns: Any) -> None:
        """Ingest one value for each person, with an event time `number` hours after the start."""
        commit_rows(self.target(), self.rows(number, **columns), ingest_id=f"batch{number}")

    def write(self, number: int, name: str) -> list[BucketFile]:
        """Write the same values as `ingest` into files that begin with `name`, without a commit."""
        return offline.write_files(self.rows(number), self.target(), name=name)

    def rows(self, number: int, **columns: Any) -> pa.Table:
        """Return the rows of a batch, with some columns changed."""
        first = number * PEOPLE
        times = [START + timedelta(hours=number)] * PEOPLE
        amounts = pa.array([float(first + person) for person in range(PEOPLE)])
        values = {"person_id": pa.array(range(PEOPLE)), "amount": amounts} | columns
        return feature_rows(times, first_seq=first, **values)

    def target(self) -> Target:
        return target_of(self.uri, view_spec(self.ledger, "income"), self.access)

    def newest(self) -> Snapshot:
        return pin(self.target())

    def build(self, output: str = "train", **given: Any) -> dict[str, Any]:
        """Build a training set like `feature_jobs.training_set`."""
        if "manifest" not in given:
            given = {"service": "credit", "entities": f"{self.root}/people.parquet"} | given
        config = TrainingSetConfig(
            storage=StorageConfig(root=str(self.root)), output=f"{self.root.parent}/{output}.parquet", **given
        )
        return build_training_set(
            config, load_request(config, self.ledger), self.ledger, access=self.access, actor="test"
        )

    def again(self, output: str = "train", **given: Any) -> dict[str, Any]:
        """Build the same training set from its manifest."""
        return self.build("again", manifest=str(self.manifest(output)), **given)

    def manifest(self, output: str = "train") -> Path:
        return self.root.parent / f"{output}.manifest.json"

    def close(self) -> None:
        self.ledger.engine.dispose()
