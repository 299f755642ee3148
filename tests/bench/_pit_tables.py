"""The feature store's tables for `pit_join`: the same rows as feature tables, in plaintext and encrypted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.source import TokenSource
from feature_jobs.store.catalog.protection import ORDERING, view_protection
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec, ViewSpec
from feature_jobs.store.offline import tables as offline
from tests.bench._pit_data import TTL_DAYS, VIEWS, feature_names

BUCKETS = 8
KEYS = [f"features/t{view}/{name}" for view in range(VIEWS) for name in ("internal", "personal")]


def service(*, protected: bool) -> tuple[ServiceSpec, dict[str, Protection]]:
    """Return the service and the protection of each table.

    With `protected`, two of five features are personal and the other features are internal. Otherwise, all features are
    public.
    """
    views = []
    for number in range(VIEWS):
        fields = [
            FieldSpec(
                name=name,
                dtype="float64",
                sensitivity="personal" if at < 2 else "internal",
                categorical=False,
            )
            for at, name in enumerate(feature_names(number))
        ]
        views.append(
            ViewSpec(
                name=f"t{number}",
                version="1",
                join_keys=["entity_id"],
                fields=fields,
                ttl_s=TTL_DAYS * 86_400,
            )
        )
    protections = {view.name: view_protection(view) if protected else _public(view) for view in views}
    return ServiceSpec(name="bench", version="1", views=views), protections


def _public(view: ViewSpec) -> Protection:
    names = (*view.join_keys, *ORDERING, *(field.name for field in view.fields))
    return Protection(default=f"features/{view.name}/internal", keys=tuple((name, None) for name in names))


def write_tables(folder: Path, kind: str, access: KeyAccess) -> None:
    """Ingest `t0.parquet`, `t1.parquet`, ..., each as one batch of its own feature table."""
    spec, protections = service(protected=kind == "protected")
    for view in spec.views:
        rows = pq.read_table(folder / f"{view.name}.parquet")
        seq = pa.array(np.arange(rows.num_rows))
        rows = rows.append_column("ingested_at", rows["created_timestamp"]).append_column("ingest_seq", seq)
        uri = f"{folder}/{kind}/{view.name}"
        target = offline.Target(
            uri=uri, keys=("entity_id",), buckets=BUCKETS, protection=protections[view.name], access=access
        )
        offline.create_table(uri, rows.schema, num_buckets=BUCKETS)
        files = offline.write_files(rows, target, name="batch")
        batch = offline.Batch(
            ingest_id="batch",
            rows_in=rows.num_rows,
            rows_stored=rows.num_rows,
            rows_quarantined=0,
            reasons={},
            quarantine=None,
        )
        offline.commit(DeltaTable(uri), rows.schema, files, batch, seq=rows.num_rows - 1)


def keep_access(folder: Path, access: KeyAccess) -> None:
    """Store the key access in the folder, so that each run can read it."""
    (folder / "access.json").write_text(
        json.dumps({"socket": access.socket, "token": str(access.token.path())})
    )


def access_of(folder: Path) -> KeyAccess:
    """Return the key access that `keep_access` has stored."""
    told = json.loads((folder / "access.json").read_text())
    return KeyAccess(socket=told["socket"], token=TokenSource(file=told["token"]))
