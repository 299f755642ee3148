"""CSV, JSON lines and SQL are read with the declared types. A value that would change is refused with a reason."""

from __future__ import annotations

import gzip
import sqlite3
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DefinitionError, SchemaMismatch, SourceError
from cluster.storage import Layout
from feature_jobs.store import FeatureView, Field, FileSource, SqlSource
from feature_jobs.store.definitions.sources import Source, from_path
from feature_jobs.store.ingestion.declared_types import (
    Roles,
    column_types,
    text_column,
    typed_rows,
    value_column,
)
from feature_jobs.store.ingestion.files import open_source
from feature_jobs.store.ingestion.source_blocks import block_reader
from feature_jobs.store.ingestion.sql import RowDigest, read_chunks
from tests.projects.views import make_view

FIELDS = [Field("amount", "float64"), Field("items", "int64"), Field("city", "string"), Field("new", "bool")]
DAY = datetime(2024, 1, 1, tzinfo=UTC)
CSV = """person_id,amount,items,city,new,at,note
1,1.5,3,"Muscat, Ruwi",true,2024-01-01,x
2,,,"",0,2024-01-01T02:00:00+02:00,007
3,2,-4,"two
lines",,2024-01-01 00:00:00.1234567Z,
"""


def view(source: Source, *fields: Field) -> FeatureView:
    return make_view(source=source, schema=fields or FIELDS)


def read(path: Path | str, text: str | bytes | None = None, *fields: Field, **options: Any) -> pa.Table:
    """Return a file's first rows with the types that the view declares."""
    if text is not None:
        Path(path).write_bytes(text.encode() if isinstance(text, str) else text)
    source = FileSource(str(path), event_timestamp="at", **options)
    files = open_source(source, Layout(""))
    return block_reader(files, view(source, *fields), {}).read_head(files.paths[0])


def test_csv_is_read_with_the_declared_types(tmp_path: Path) -> None:
    """Quoted line breaks, nulls and zones are read; event times are rounded up; undeclared columns are text."""
    table = read(tmp_path / "a.csv", CSV)
    assert table.to_pydict() == {
        "person_id": [1, 2, 3],
        "amount": [1.5, None, 2.0],
        "items": [3, None, -4],
        "city": ["Muscat, Ruwi", "", "two\nlines"],
        "new": [True, False, None],
        "at": [DAY, DAY, DAY.replace(microsecond=123457)],
        "note": ["x", "007", None],
    }


def test_csv_dialect_is_described_by_the_source(tmp_path: Path) -> None:
    """Delimiter, null values, types of columns that the view does not declare, any file name, and compression."""
    text = "person_id;amount;items;city;new;at;raw\n007;NA;1;NA;1;2024-01-01;3\n"
    options: dict[str, Any] = {"delimiter": ";", "nulls": ["", "NA"], "columns": {"raw": "int32"}}
    row = read(tmp_path / "a.txt", text, format="csv", **options).to_pylist()[0]
    assert (row["person_id"], row["amount"], row["city"], row["raw"]) == ("007", None, None, 3)
    assert read(tmp_path / "a.csv.gz", gzip.compress(CSV.encode())).num_rows == 3


JSON = """{"person_id": 1, "amount": 1, "items": 3, "city": "Sur", "new": true, "at": "2024-01-01", "deep": {"a": [1]}}

{"person_id": 2, "at": "2024-01-01T00:00:00Z", "amount": 0.5, "items": null}
"""


def test_json_lines_are_read_with_the_declared_types(tmp_path: Path) -> None:
    """A missing value is null, a blank line is skipped, and an undeclared column is JSON text."""
    table = read(tmp_path / "a.jsonl", JSON)
    full = {"person_id": 1, "amount": 1.0, "items": 3, "city": "Sur", "new": True, "at": DAY}
    nulls = dict.fromkeys(("items", "city", "new", "deep"))
    assert table.to_pylist() == [
        full | {"deep": '{"a":[1]}'},
        {"person_id": 2, "amount": 0.5, "at": DAY} | nulls,
    ]
    assert table.schema.field("amount").type == pa.float64()


def test_source_may_be_any_fsspec_uri_or_a_folder(tmp_path: Path) -> None:
    """Files of other formats in the folder are left out."""
    with fsspec.open("memory://in/a.csv", "wb") as file:
        file.write(CSV.encode())
    assert read("memory://in/a.csv").num_rows == 3
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.jsonl").write_text(JSON)
    assert read(tmp_path, format="json").num_rows == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "no header"),
        ("a.csv", "a,b\n1,secret,3\n", "cannot be read as CSV: .* Expected 2 columns, got 3"),
        ("a.csv", b"a,b\n1,\xff\n", "cannot be read as CSV"),
        ("a.jsonl", "{secret", "not JSON"),
        ("a.json", '[{"a": 1}]', "not a JSON object"),
        ("a.csv.gz", "plain", "cannot be read as CSV"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, name: str, text: str | bytes, words: str) -> None:
    """The message has the file and the cause, but no content of the file."""
    with pytest.raises(SourceError, match=words) as refusal:
        read(tmp_path / name, text)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        *[("int64", text) for text in ("1.0", "secret", "9223372036854775808", "0x1f")],
        ("int32", "3000000000"),
        *[("float64", text) for text in ("1,5", " 1", "9007199254740993", "1e400")],
        *[("float32", text) for text in ("16777217000000001", "16777217", "1e39")],
        ("bool", "yes"),
        *[("timestamp", text) for text in ("01/02/2024", "1704067200", "2024-01-01T25:00:00")],
        ("timestamp", "2024-01-01T00:00:00.0000001Z"),
    ],
)
def test_text_that_would_change_is_refused(dtype: str, text: str) -> None:
    """The message has the number of bad values, but not the value, which may be personal."""
    column = pa.chunked_array([pa.array([None, text], pa.string())])
    with pytest.raises(SchemaMismatch, match=f"'x' should be {dtype}; 1 of 2 values") as refusal:
        text_column(column, dtype, name="x")
    assert f" {text}" not in str(refusal.value)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        *[("int64", [value]) for value in (1.5, True, "1", Decimal("1.5"), Decimal(2**63), 2**63)],
        *[("float64", [value]) for value in (2**53 + 1, Decimal(2**53 + 1), "1.5")],
        ("float32", [Decimal(2**24 + 1)]),
        ("string", [1]),
        ("bool", [2]),
        ("timestamp", [1704067200]),
        ("float64", [2**53 + 1, 0.5]),
        ("float32", [Decimal("1e38"), Decimal("1e39")]),
        ("timestamp", [DAY, 1704067200]),
        ("string", ["a", 1]),
        ("int64", [1, {"a": 1}]),
    ],
)
def test_value_of_another_type_is_refused(dtype: str, values: list[Any]) -> None:
    """Values of JSON and SQL have a type already, so they are not converted to another one."""
    with pytest.raises(SchemaMismatch, match="'x' should be"):
        value_column(values, dtype, name="x")


def test_times_of_a_database_are_converted_to_utc() -> None:
    """A column may mix times with and without a zone, and dates. Times without one have the source's zone."""
    dubai = timezone(timedelta(hours=4))
    values = [DAY.astimezone(dubai), datetime(2024, 1, 1), None, date(2024, 1, 1)]
    assert value_column(values, "timestamp", name="at").to_pylist() == [DAY, DAY, None, DAY]
    local = Roles(zone="America/Los_Angeles")
    times = value_column(values, "timestamp", name="at", roles=local).to_pylist()
    assert times == [DAY, DAY.replace(hour=8), None, DAY.replace(hour=8)]


def test_decimals_of_a_database_are_converted_to_floats() -> None:
    """Whole numbers are accepted if the float holds them exactly."""
    assert value_column([Decimal("0.5"), Decimal(2**53)], "float64", name="x").to_pylist() == [0.5, 2**53]


def test_text_key_among_whole_numbers_is_refused(tmp_path: Path) -> None:
    """`007` comes after many rows with whole numbers. It would become 7, which is another key."""
    lines = [f"{n},1,1,a,1,2024-01-01" for n in range(1, 1500)]
    text = "\n".join(["person_id,amount,items,city,new,at", *lines, "007,1,1,a,1,2024-01-01"])
    (tmp_path / "a.csv").write_text(text)
    source = FileSource(str(tmp_path / "a.csv"), event_timestamp="at")
    files = open_source(source, Layout(""))
    reader = block_reader(files, view(source), {})
    with pytest.raises(SchemaMismatch, match="Column 'person_id' should be int64; 1 of"):
        list(reader.read_typed(files.paths[0]))


@given(st.lists(st.none() | st.floats(allow_nan=False) | st.integers(-(2**53), 2**53)))
def test_numbers_written_as_text_are_read_exactly(values: list[float | None]) -> None:
    """This holds for numbers of every magnitude."""
    text = [None if value is None else repr(value) for value in values]
    column = text_column(pa.chunked_array([pa.array(text, pa.string())]), "float64", name="x")
    assert column.to_pylist() == values


@pytest.mark.parametrize(
    ("keys", "key_types", "expected"),
    [
        (["1", "-2", "0"], {}, "int64"),
        (["1", "007"], {}, "string"),
        (["1"], {"person_id": "string"}, "string"),
        ([None], {}, "string"),
    ],
)
def test_key_is_a_whole_number_if_all_first_rows_are(
    keys: list[str | None], key_types: dict[str, str], expected: str
) -> None:
    """The type in the feature table has priority over the first rows."""
    first = pa.table({"person_id": pa.array(keys, pa.string())})
    types = column_types(view(FileSource("a.csv", event_timestamp="at")), first, key_types)
    assert types["person_id"] == expected


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE income (person_id INTEGER, amount REAL, new BOOLEAN, at TEXT)")
        rows = [(n, n / 2, n % 2, "2024-01-01 00:00:00") for n in range(5)]
        connection.executemany("INSERT INTO income VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return path


def rows_of(source: SqlSource, **environment: str) -> list[dict[str, Any]]:
    return [row for chunk in read_chunks(source, environment) for row in chunk]


def test_sql_is_read_by_table_or_query_with_the_declared_types(database: Path) -> None:
    """The URL comes from the environment. SQLite's 0 and 1 become bools, and its text becomes times."""
    by_table = SqlSource(url_env="SHOP", table="income", event_timestamp="at")
    rows = rows_of(by_table, SHOP=f"sqlite:///{database}")
    declared = view(by_table, Field("amount", "float64"), Field("new", "bool"))
    table = typed_rows(rows, column_types(declared, typed_rows(rows, {"person_id": "int64"}), {}))
    assert table.slice(1, 1).to_pylist() == [{"person_id": 1, "amount": 0.5, "new": True, "at": DAY}]
    query = "SELECT * FROM income WHERE person_id > 2"
    by_query = SqlSource(url_env="SHOP", query=query, event_timestamp="at")
    assert len(rows_of(by_query, SHOP=f"sqlite:///{database}")) == 2


def test_digest_of_rows_does_not_depend_on_their_order(database: Path) -> None:
    """A query returns its rows in any order. The same rows are the same batch."""
    digests = []
    for tail in ("", " ORDER BY person_id DESC", " WHERE person_id < 4", " UNION ALL SELECT * FROM income"):
        query = f"SELECT * FROM income{tail}"
        source = SqlSource(url=f"sqlite:///{database}", query=query, event_timestamp="at")
        digest = RowDigest()
        for chunk in read_chunks(source):
            digest.add(chunk)
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ({"url_env": "SHOP"}, {}, "variable SHOP, which is missing"),
        ({"url_env": "SHOP"}, {"SHOP": "shop"}, "not a SQLAlchemy URL"),
        ({"url_file": "/nowhere/url"}, {}, "missing or empty"),
        ({"url": "sqlite:////nowhere/shop.db"}, {}, "no SQLite database at /nowhere/shop.db"),
        (
            {"url_env": "SHOP"},
            {"SHOP": "postgresql+psycopg://u:hunter2@127.0.0.1:1/x?connect_timeout=1"},
            "cannot be read",
        ),
    ],
)
def test_unreadable_database_is_refused(
    options: dict[str, str], environment: dict[str, str], words: str
) -> None:
    """The message says where the URL should be, and never contains a password."""
    source = SqlSource(table="income", event_timestamp="at", **options)
    with pytest.raises(SourceError, match=words) as refusal:
        rows_of(source, **environment)
    assert "hunter2" not in str(refusal.value)


def test_failing_query_is_refused(database: Path) -> None:
    """The table does not exist, or two columns have the same name."""
    for query, words in (("SELECT * FROM outcome", "no such table"), ("SELECT 1 a, 2 a", "two columns 'a'")):
        source = SqlSource(url=f"sqlite:///{database}", query=query, event_timestamp="at")
        with pytest.raises(SourceError, match=words):
            rows_of(source)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FileSource("a.csv", event_timestamp="at", format="xml"), "unknown format 'xml'"),
        (lambda: FileSource("a.csv", event_timestamp="at", delimiter="||"), "one character"),
        (lambda: FileSource("a.csv", event_timestamp="at", nulls="NA"), "nulls must be a list"),
        (lambda: FileSource("a.csv", event_timestamp="at", columns={"x": "flaot64"}), "mean 'float64'"),
        (lambda: SqlSource(url="sqlite:///a.db", event_timestamp="at"), "a query or a table"),
        (lambda: SqlSource(table="t", event_timestamp="at"), "one of url, url_env and url_file"),
        (
            lambda: SqlSource(url="postgresql://u:p@h/d", table="t", event_timestamp="at"),
            "must not hold a password",
        ),
    ],
)
def test_invalid_source_is_refused(make: Any, words: str) -> None:
    """The error is raised when the source is defined."""
    with pytest.raises(DefinitionError, match=words):
        make()


def test_parquet_source_keeps_the_version_of_earlier_releases() -> None:
    """Options that are not used are not part of the definition."""
    source = FileSource("income.parquet", event_timestamp="at")
    assert view(source, Field("amount", "float64")).version == "daf4dbae3339"


def test_replacement_file_has_the_sources_columns_and_its_own_format() -> None:
    """An example is a CSV backfill of a view that reads a database."""
    sql = SqlSource(url_env="SHOP", table="t", event_timestamp="at", created_timestamp="known")
    csv = FileSource("a.txt", event_timestamp="at", format="csv", delimiter=";")
    assert from_path(sql, "old.csv").definition()["created_timestamp"] == "known"
    assert (from_path(csv, "b.txt").kind, from_path(csv, "b.txt").delimiter) == ("csv", ";")
    assert from_path(csv, "b.parquet").kind == "parquet"


def test_partition_folders_are_columns_in_every_format(tmp_path: Path) -> None:
    """A column of the file has priority over a folder, and Hive's text for null becomes null."""
    folder = tmp_path / "in" / "at=2024-01-01" / "city=Abu%20Dhabi" / "items=3" / "other=9"
    null = tmp_path / "in" / "at=2024-01-01" / "city=__HIVE_DEFAULT_PARTITION__" / "items=4"
    row = {"person_id": 1, "amount": 0.5, "new": True, "items": 7}
    for number, path in enumerate((folder, null)):
        path.mkdir(parents=True)
        frame = pl.DataFrame({name: [value] for name, value in row.items() if number or name != "items"})
        frame.write_parquet(path / "x.parquet")
        frame.write_csv(path / "x.csv")
        frame.write_ndjson(path / "x.jsonl")
    for kind in ("parquet", "csv", "json"):
        source = FileSource(str(tmp_path / "in"), event_timestamp="at", format=kind)
        files = open_source(source, Layout(""))
        first, second = map(block_reader(files, view(source), {}).read_head, files.paths)
        assert "other" not in first.column_names
        assert (first["city"].to_pylist(), first["items"].to_pylist()) == (["Abu Dhabi"], [3])
        assert (second["city"].to_pylist(), second["items"].to_pylist()) == ([None], [7])
        assert first["at"].to_pylist() == [DAY]
