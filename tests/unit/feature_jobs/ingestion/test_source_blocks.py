"""Sources with several files: each file is read and cast on its own, and a refusal names the file and the column."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cluster.errors import SchemaMismatch, SourceError
from cluster.storage import Layout, read_parquet
from feature_jobs.store import FeatureView, Field, FileSource
from feature_jobs.store.ingestion.files import open_source
from feature_jobs.store.ingestion.quarantine import source_rows, source_schema
from feature_jobs.store.ingestion.source_blocks import (
    PIECE_VALUES,
    block_reader,
    checked_blocks,
    empty_part,
    split_source,
)
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare_part
from tests.projects.views import make_view

NOW = datetime(2025, 1, 1, tzinfo=UTC)
DAY = datetime(2024, 1, 1, tzinfo=UTC)
FIELDS = [Field("amount", "float64"), Field("city", "string")]


def view(path: Path, *fields: Field, transform: Any = None, **options: Any) -> FeatureView:
    source = FileSource(str(path), event_timestamp="at", **options)
    return make_view(source=source, schema=fields or FIELDS, transform=transform)


def write(path: Path, **changes: Any) -> Path:
    """Write a file with one row. A column that is None is left out."""
    columns = {
        "person_id": pa.array([1]),
        "amount": pa.array([1.5]),
        "city": pa.array(["Sur"]),
        "at": pa.array([DAY], pa.timestamp("us", "UTC")),
    } | changes
    path.parent.mkdir(exist_ok=True)
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    pq.write_table(table, path, use_deprecated_int96_timestamps=path.name.startswith("spark"))
    return path


def read(declared: FeatureView) -> pa.Table:
    """Return all rows of the view's source, checked."""
    files = open_source(declared.source, Layout(""))  # type: ignore[arg-type]
    reader = block_reader(files, declared, {})
    check = partial(prepare_part, view=declared, now=NOW)
    pieces = split_source(files, declared, num_columns=4)
    parts = [part for piece in pieces for part in checked_blocks(piece, reader, check)]
    assert sum(part.num_rows for part in parts) == files.rows
    return pa.concat_tables(parts)


def test_files_may_encode_a_column_differently(tmp_path: Path) -> None:
    """Text may be plain, large or dictionary codes. Numbers may have other widths, times other units and zones."""
    folder = tmp_path / "in"
    write(folder / "a.parquet")
    write(
        folder / "b.parquet", city=pa.array(["Sur"]).dictionary_encode(), amount=pa.array([1.5], pa.float32())
    )
    write(
        folder / "c.parquet", city=pa.array(["Sur"], pa.large_string()), person_id=pa.array([1], pa.int32())
    )
    write(folder / "d.parquet", at=pa.array([datetime(2024, 1, 1)], pa.timestamp("ms")), city=pa.nulls(1))
    write(folder / "e.parquet", at=pa.array([date(2024, 1, 1)]), amount=pa.array([2], pa.int8()))
    rows = read(view(folder))
    assert rows["person_id"].to_pylist() == [1] * 5
    assert rows["amount"].to_pylist() == [1.5, 1.5, 1.5, 1.5, 2.0]
    assert rows["city"].to_pylist() == ["Sur", "Sur", "Sur", None, "Sur"]
    assert rows["event_timestamp"].to_pylist() == [DAY] * 5


def test_float_file_does_not_change_the_integers_of_another_file(tmp_path: Path) -> None:
    """pandas writes whole numbers with a null as floats. The integers of other files are not cast to floats."""
    write(tmp_path / "a.parquet", amount=pa.array([2**53 + 1]))
    write(tmp_path / "b.parquet", amount=pa.array([None, 7.0])[1:])
    fields = (Field("amount", "int64"), Field("city", "string"))
    assert read(view(tmp_path / "*.parquet", *fields))["amount"].to_pylist() == [2**53 + 1, 7]


def upper(block: pa.Table) -> pa.Table:
    """Return the city in upper case. Requires plain text."""
    assert block.schema.field("city").type == pa.string()
    position = block.schema.get_field_index("city")
    return block.set_column(position, "city", pc.utf8_upper(block["city"]))


def test_transform_and_quarantine_have_one_type_for_all_files(tmp_path: Path) -> None:
    """Rows of every file are read back from quarantine with the common type."""
    folder = tmp_path / "in"
    write(folder / "a.parquet", person_id=pa.array([None], pa.int64()))
    write(folder / "b.parquet", person_id=pa.nulls(1), city=pa.array(["Ruwi"]).dictionary_encode())
    rows = read(view(folder, transform=upper))
    assert rows["city"].to_pylist() == ["SUR", "RUWI"]
    bad = rows.select([REASON, RAW]).rename_columns(["reason", "raw"])
    schema = source_schema(bad)
    assert schema is not None
    assert source_rows(bad, schema)["city"].to_pylist() == ["Sur", "Ruwi"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"city": None}, r"b\.parquet: Column 'city' \(string\) of view 'income' is missing"),
        ({"amount": pa.array(["much"])}, r"b\.parquet: Column 'amount' should be double"),
        ({"amount": pa.array([2**53 + 1])}, r"b\.parquet: Column 'amount' should be double"),
        ({"person_id": pa.array(["1"])}, r"'person_id' is int64 in .*a\.parquet and string in .*b\.parquet"),
        ({"at": pa.array(["2024-01-01"])}, r"b\.parquet: Column 'at' should be timestamp"),
    ],
)
def test_refusal_names_file_and_column(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Only the second file is wrong."""
    folder = tmp_path / "in"
    write(folder / "a.parquet")
    write(folder / "b.parquet", **changes)
    with pytest.raises(SchemaMismatch, match=words):
        read(view(folder))


def test_refusal_names_the_text_file(tmp_path: Path) -> None:
    """The wrong row is far behind the first rows. The message also has the column or the line."""
    head = "person_id,amount,city,at\n"
    (tmp_path / "a.csv").write_text(head + "1,1,a,2024-01-01\n")
    (tmp_path / "b.csv").write_text(head + "1,1,a,2024-01-01\n" * 2000 + "1,many,a,2024-01-01\n")
    with pytest.raises(SchemaMismatch, match=r"b\.csv: Column 'amount' should be float64; 1 of"):
        read(view(tmp_path / "*.csv"))
    line = json.dumps({"person_id": 1, "amount": 1, "city": "a", "at": "2024-01-01"})
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "b.jsonl").write_text(f"{line}\n" * 5 + "{")
    with pytest.raises(SourceError, match=r"b\.jsonl: Line 6 is not JSON"):
        read(view(tmp_path / "*.jsonl"))


def test_file_without_rows_decides_no_types(tmp_path: Path) -> None:
    """It decides neither the type of a key nor that of another column."""
    head = "person_id,amount,city,at\n"
    (tmp_path / "a.csv").write_text(head)
    (tmp_path / "b.csv").write_text(head + "7,1,a,2024-01-01\n")
    assert read(view(tmp_path / "*.csv"))["person_id"].to_pylist() == [7]
    floats = {name: pa.array([], pa.float64()) for name in ("person_id", "amount", "city", "at")}
    write(tmp_path / "a.parquet", **floats)
    write(tmp_path / "b.parquet")
    assert read(view(tmp_path / "*.parquet"))["person_id"].to_pylist() == [1]


def test_source_without_rows_needs_only_its_columns() -> None:
    """Types are not checked, because an empty pandas frame has no useful types. A transform's columns are unknown."""
    names = ["person_id", "amount", "city", "at"]
    for transform in (None, upper):
        part = empty_part(view(Path("x.parquet"), transform=transform), names, now=NOW)
        assert (part.num_rows, part.column_names[:3]) == (0, names[:3])
    with pytest.raises(SchemaMismatch, match="Column 'city'"):
        empty_part(view(Path("x.parquet")), ["person_id", "amount", "at"], now=NOW)


SEEN = [Field("seen", "timestamp")]


def test_int96_times_of_all_years_are_exact(tmp_path: Path) -> None:
    """A nanosecond in an event time is rounded up; in a feature, it is refused."""
    years = [datetime(year, 12, 31, tzinfo=UTC) for year in (1, 1500, 1677, 2024, 2262, 9999)]
    kind = pa.timestamp("us", "UTC")
    write(
        tmp_path / "spark.parquet",
        person_id=pa.array(range(6)),
        amount=None,
        city=None,
        at=pa.array([*years[:4], None, None], kind),
        seen=pa.array(years, kind),
    )
    rows = read(view(tmp_path / "spark.parquet", *SEEN))
    assert rows["seen"].to_pylist() == years
    assert rows["event_timestamp"].to_pylist() == [*years[:4], None, None]
    assert read_parquet(str(tmp_path / "spark.parquet"))["seen"].to_pylist() == [
        year.replace(tzinfo=None) for year in years
    ]
    fine = pa.array([int(DAY.timestamp()) * 10**9 + 1], pa.timestamp("ns", "UTC"))
    write(tmp_path / "spark_ns.parquet", at=fine)
    [at] = read(view(tmp_path / "spark_ns.parquet"))["event_timestamp"].to_pylist()
    assert at == DAY.replace(microsecond=1)
    write(tmp_path / "spark_seen.parquet", seen=fine)
    with pytest.raises(SchemaMismatch, match="'seen' has times that are finer"):
        read(view(tmp_path / "spark_seen.parquet", *SEEN))


def test_nested_int96_times_do_not_prevent_reading(tmp_path: Path) -> None:
    """No feature uses them, and every reader can read the file."""
    times = pa.array([DAY], pa.timestamp("us", "UTC"))
    nested = pa.StructArray.from_arrays([times], ["when"])
    path = write(tmp_path / "spark.parquet", inner=nested, **{"a.b": times})
    assert read(view(path))["event_timestamp"].to_pylist() == [DAY]
    table = read_parquet(str(path))
    assert table["inner"].to_pylist() == [{"when": DAY.replace(tzinfo=None)}]
    assert table["a.b"].to_pylist() == [DAY.replace(tzinfo=None)]


def test_int96_entity_rows_are_read_as_nanoseconds(tmp_path: Path) -> None:
    """Earlier releases did so if nanoseconds can hold all times, and the hash of entity rows must not change."""
    write(tmp_path / "spark.parquet")
    assert read_parquet(str(tmp_path / "spark.parquet")).schema.field("at").type == pa.timestamp("ns")


@pytest.mark.parametrize("name", ["a.parquet", "spark.parquet", "a.csv", "a.jsonl"])
def test_time_zone_of_a_source_applies_to_every_format(tmp_path: Path, name: str) -> None:
    """Without a declared zone, times are UTC, and the column is reported as one without a zone."""
    local = datetime(2024, 1, 1)
    row = {"person_id": 1, "seen": "2024-07-01T00:00:00", "at": "2024-01-01"}
    match name.rsplit(".", 1)[1]:
        case "csv":
            (tmp_path / name).write_text("person_id,seen,at\n" + ",".join(map(str, row.values())))
        case "jsonl":
            (tmp_path / name).write_text(json.dumps(row))
        case _:
            seen = pa.array([datetime(2024, 7, 1)], pa.timestamp("us"))
            write(tmp_path / name, at=pa.array([local], pa.timestamp("us")), seen=seen)
    for zone, hours in ((None, (0, 0)), ("America/Los_Angeles", (8, 7))):
        declared = view(tmp_path / name, *SEEN, zone=zone)
        reader = block_reader(open_source(declared.source, Layout("")), declared, {})  # type: ignore[arg-type]
        rows = read(declared)
        assert rows["event_timestamp"].to_pylist() == [DAY.replace(hour=hours[0])]
        assert rows["seen"].to_pylist() == [datetime(2024, 7, 1, hours[1], tzinfo=UTC)]
        assert list(reader.zoneless) == ([] if zone else ["at"])


def test_empty_row_groups_are_in_no_piece(tmp_path: Path) -> None:
    """Arrow reads no block from a piece of empty row groups."""
    table = pq.read_table(write(tmp_path / "one.parquet"))
    many, none = pa.concat_tables([table] * 200), table.slice(0, 0)
    path = tmp_path / "groups.parquet"
    with pq.ParquetWriter(path, table.schema) as writer:
        for group in (none, many, none, many, none):
            writer.write_table(group)
    declared = view(path)
    files = open_source(declared.source, Layout(""))  # type: ignore[arg-type]
    pieces = split_source(files, declared, num_columns=PIECE_VALUES // 100)
    assert [piece.row_groups for piece in pieces] == [[1], [3]]
    assert read(declared).num_rows == 400
