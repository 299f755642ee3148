"""A feature store without a cluster: a ledger, one view's table, training sets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from cluster.ledger import Ledger
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from cluster.settings import StorageConfig
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, Sensitivity
from feature_jobs.store.catalog.protection import view_protection
from feature_jobs.store.catalog.specifications import Definitions, apply, view_spec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Batch, BucketFile, Snapshot, Target, snapshot
from feature_jobs.training_set import TrainingSetConfig, build_training_set, load_request

TIME = pa.timestamp("us", "UTC")
START = datetime(2024, 1, 1, tzinfo=UTC)
INCOME = FeatureView(
    "income",
    entities=[Entity("person", join_keys=["person_id"])],
    source=FileSource("x.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)],
)
PEOPLE = 20


class FeatureProject:
    """A storage root with a ledger and one view's table, and the commands but for attaching and the policies."""

    def __init__(self, root: Path, access: KeyAccess) -> None:
        root.mkdir()
        self.root, self.access = root, access
        self.ledger = Ledger(f"sqlite:///{root}/ledger.db")
        self.uri = f"{root}/features/income"
        self.apply(INCOME)
        self.write_entities(PEOPLE)

    def apply(self, view: FeatureView) -> None:
        services = {"credit": FeatureService("credit", views=[view])}
        apply(Definitions(module="m", views={view.name: view}, services=services), self.ledger, actor="test")

    def write_entities(self, count: int) -> None:
        at = pa.array([START + timedelta(days=9)] * count, TIME)
        pq.write_table(
            pa.table({"person_id": range(count), "event_timestamp": at}), self.root / "people.parquet"
        )

    def ingest(self, number: int, **columns: Any) -> None:
        """A value for each person, `number` hours after the start."""
        files = self.write(number, f"batch{number}", **columns)
        batch = Batch(
            ingest_id=f"{number}",
            rows_in=PEOPLE,
            rows_stored=PEOPLE,
            rows_quarantined=0,
            reasons={},
            quarantine=None,
        )
        schema = protected_files(self.access).read(f"{self.uri}/{files[0].path}").schema
        offline.evolve_schema(DeltaTable(self.uri), schema, view="income")
        offline.commit(DeltaTable(self.uri), schema, files, batch, seq=PEOPLE * (number + 1) - 1)

    def write(self, number: int, name: str, **columns: Any) -> list[BucketFile]:
        """Its files, without the commit."""
        seq = list(range(number * PEOPLE, (number + 1) * PEOPLE))
        times = pa.array([START + timedelta(hours=number)] * PEOPLE, TIME)
        rows = {
            "person_id": pa.array(range(PEOPLE)),
            "amount": pa.array([float(one) for one in seq]),
            "event_timestamp": times,
            "created_timestamp": times,
            "ingested_at": times,
            "ingest_seq": pa.array(seq),
        }
        table = pa.table(rows | columns)
        offline.create_table(self.uri, table.schema, num_buckets=2)
        target = Target(
            uri=self.uri,
            keys=("person_id",),
            buckets=2,
            protection=view_protection(view_spec(self.ledger, "income")),
            access=self.access,
        )
        return offline.write_files(table, target, name=name)

    def newest(self) -> Snapshot:
        spec = view_spec(self.ledger, "income")
        return snapshot(
            self.uri,
            view="income",
            keys=["person_id"],
            protection=view_protection(spec),
            access=self.access,
        )

    def build(self, output: str = "train", **given: Any) -> dict[str, Any]:
        """What `feature_jobs.training_set` does."""
        if "manifest" not in given:
            given = {"service": "credit", "entities": f"{self.root}/people.parquet"} | given
        config = TrainingSetConfig(
            storage=StorageConfig(root=str(self.root)), output=f"{self.root.parent}/{output}.parquet", **given
        )
        return build_training_set(
            config, load_request(config, self.ledger), self.ledger, access=self.access, actor="test"
        )

    def again(self, output: str = "train", **given: Any) -> dict[str, Any]:
        """The same from its manifest."""
        return self.build("again", manifest=str(self.manifest(output)), **given)

    def manifest(self, output: str = "train") -> Path:
        return self.root.parent / f"{output}.manifest.json"

    def close(self) -> None:
        self.ledger.engine.dispose()
