"""The features: what each machine measured, and the service that the model reads."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, NotNull, Range


def heat(rows: pa.Table) -> pa.Table:
    """Add how much warmer the machine is than the room. Training and serving use this same function."""
    return rows.append_column("heat", pc.subtract(rows["temperature"], rows["room_temperature"]))


machine = Entity("machine", join_keys={"machine_id": "int64"})
readings = FeatureView(
    "readings",
    entities=[machine],
    source=FileSource(
        "data/readings.parquet",
        event_timestamp="read_at",
        columns={"temperature": "float64", "room_temperature": "float64"},
    ),
    schema=[
        Field("heat", "float64", from_columns=["temperature", "room_temperature"]),
        Field("vibration", "float64"),
        Field("line", "string"),
    ],
    transform=heat,
    checks=[NotNull("vibration"), Range("vibration", minimum=0)],
)
maintenance = FeatureService("maintenance", views=[readings])
