"""Tests of this project's own code. They need no cluster."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from data_check import figures
from features import heat, readings

READINGS = Path(__file__).parents[1] / "data" / "readings.parquet"


def test_heat_is_the_difference_to_the_room() -> None:
    rows = pa.table({"temperature": [50.0, None], "room_temperature": [20.0, 20.0]})
    assert heat(rows)["heat"].to_pylist() == [30.0, None]


def test_the_data_has_all_columns_of_the_view() -> None:
    columns = heat(pq.read_table(READINGS)).column_names
    assert {"machine_id", "read_at", *readings.features} <= set(columns)


def test_the_check_counts_missing_values(tmp_path: Path) -> None:
    pq.write_table(pa.table({"machine_id": [1, 2], "vibration": [0.5, None]}), tmp_path / "rows.parquet")
    assert figures(str(tmp_path / "rows.parquet"), key="machine_id", column="vibration") == {
        "rows": 2,
        "entities": 2,
        "missing_share": 0.5,
    }
