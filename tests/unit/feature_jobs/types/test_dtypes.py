"""Dtypes: names, lossless casts, JSON forms, and the checks, windows and defaults that they allow."""

from __future__ import annotations

import datetime as dt
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import DefinitionError, SchemaMismatch
from feature_jobs.store import (
    Aggregation,
    Allowed,
    Default,
    Drift,
    FeatureService,
    FeatureView,
    Field,
    Outlier,
    Pattern,
    Range,
    Unique,
)
from feature_jobs.store.definitions.checks import Check
from feature_jobs.store.ingestion.declared_types import text_column, typed_rows
from feature_jobs.store.ingestion.profiling import choose_bins, count, profile, sketch
from feature_jobs.store.ingestion.validation import REASON, prepare
from feature_jobs.store.offline.row_hash import has_row_hash, row_hash
from feature_jobs.store.types.casting import cast_feature
from feature_jobs.store.types.dtypes import DTYPES, from_json, online_value, to_arrow, to_json
from tests.projects.views import make_view

NOW = datetime(2026, 6, 1, tzinfo=UTC)
RICH = {
    "price": "decimal(12, 2)",
    "day": "date",
    "blob": "bytes",
    "emb": "list<float32, 3>",
    "tags": "list<string>",
    "codes": "list<int64>",
}
JSON: list[tuple[str, Any, Any]] = [
    ("bool", True, True),
    ("int64", 2**53 + 1, 2**53 + 1),
    ("float64", 0.1, 0.1),
    ("string", "ü", "ü"),
    ("timestamp", "2026-01-31T12:00:00.000005Z", 1769860800000005),
    ("date", "0001-01-01", -719162),
    ("decimal(12, 2)", "12.50", "12.50"),
    ("decimal(38, 10)", "0.0000000001", "0.0000000001"),
    ("bytes", "AP8=", b"\x00\xff"),
    ("list<float32, 2>", [0.5, -1.0], [0.5, -1.0]),
    ("list<string>", ["a", ""], ["a", ""]),
    ("list<int64>", [], []),
]


def view(checks: list[Check] | None = None, fields: dict[str, str] = RICH, **more: Any) -> FeatureView:
    schema = [Field(name, dtype) for name, dtype in fields.items()]
    return make_view("v", schema=schema, checks=checks or [], **more)


def block(rows: int = 2, **columns: Any) -> pa.Table:
    view_columns = {
        "price": pa.array([Decimal("1.5"), None][:rows]),
        "day": pa.array([dt.date(2026, 1, 31), None][:rows]),
        "blob": pa.array([b"\x00", None][:rows]),
        "emb": pa.array([[0.5, 1.0, 2.0], None][:rows], pa.list_(pa.float64(), 3)),
        "tags": pa.array([["a"], []][:rows], pa.list_(pa.string())),
        "codes": pa.array([[2**53 + 1], None][:rows]),
    } | columns
    times = pa.array([NOW - timedelta(days=1)] * rows, pa.timestamp("us", "UTC"))
    return pa.table({"person_id": list(range(rows)), "at": times, **view_columns})


@pytest.mark.parametrize(("dtype", "as_json", "online"), JSON, ids=[value[0] for value in JSON])
def test_json_form_goes_to_the_store_and_back(dtype: str, as_json: Any, online: Any) -> None:
    """A JSON value becomes an online value and the same JSON value again, and both give the same Arrow value."""
    assert online_value(as_json, dtype) == online
    assert list(to_json([online, None], dtype)) == [as_json, None]
    arrow = [to_arrow([value, None], dtype) for value in (as_json, online)]
    assert arrow[0].equals(arrow[1])
    assert arrow[0].type == DTYPES[dtype]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("timestamp", 1769860800000000),
        *[("date", text) for text in ("2026-01-31T00:00:00Z", "20260131")],
        *[("decimal(4, 2)", value) for value in (1.5, "1.555", "100", "NaN")],
        *[("decimal(4, 2)", Decimal(text)) for text in ("NaN", "sNaN", "-Infinity")],
        *[("bytes", text) for text in ("AP8", "ü")],
        *[("float32", value) for value in (1e39, 2**24 + 1)],
        ("float64", 2**53 + 1),
        ("int32", 2**31),
        *[("list<float32>", value) for value in (0.5, [0.5, None], [0.5, 1e39], [float("nan")])],
        ("list<float32, 2>", [0.5]),
        ("list<int64>", [True]),
        ("list<string>", [["a"]]),
    ],
)
def test_json_value_that_does_not_fit_is_refused(dtype: str, value: Any) -> None:
    """The message does not contain the value."""
    with pytest.raises(ValueError, match=r"^(?!.*(1\.555|1769860800000000))"):
        from_json(value, dtype)


def test_a_dtype_has_one_spelling_and_limits() -> None:
    """A dtype's spelling does not depend on spaces, so a view's version does not either."""
    assert Field("a", "list<float32,384>").dtype == "list<float32, 384>"
    assert Field("a", "decimal(12,2)").dtype == "decimal(12, 2)"
    unknown = ("list<list<int64>>", "list<date>", "list<int64, 0>", "list<int64, 65537>", "decimal(39, 2)")
    for dtype in (*unknown, "decimal(2, 3)", "decimal(0, 0)", "list", "decimal", "list<int64>[3]"):
        with pytest.raises(DefinitionError, match="unknown dtype"):
            Field("a", dtype)
    for dtype in RICH.values():
        with pytest.raises(DefinitionError, match="no categories"):
            Field("a", dtype, categorical=True)


@pytest.mark.parametrize(
    ("dtype", "column"),
    [
        ("decimal(12, 2)", pa.array([1.5])),
        ("decimal(12, 2)", pa.array([Decimal("1.555")])),
        ("decimal(12, 2)", pa.array([10**11])),
        ("float64", pa.array([Decimal("1.5")])),
        ("date", pa.array([datetime(2026, 1, 1, 5)])),
        ("date", pa.array([10**9], pa.int32()).cast(pa.date32())),
        ("bytes", pa.array(["a"])),
        ("string", pa.array([b"a"])),
        ("list<float32>", pa.array([[0.1]])),
        ("list<float64>", pa.array([[2**53 + 1]])),
        ("list<int64>", pa.array([1])),
        ("list<int64>", pa.array([["a"]])),
        ("int64", pa.array([[1]])),
    ],
)
def test_lossy_cast_is_refused(dtype: str, column: pa.Array) -> None:
    """The error names the column, also for elements of lists."""
    with pytest.raises(SchemaMismatch, match="Column 'c"):
        cast_feature(pa.chunked_array([column]), DTYPES[dtype], name="c")


@pytest.mark.parametrize(
    ("dtype", "column", "expected"),
    [
        ("decimal(25, 2)", pa.array([2**63], pa.uint64()), [Decimal("9223372036854775808.00")]),
        ("date", pa.array([datetime(2026, 1, 1)], pa.timestamp("ns")), [dt.date(2026, 1, 1)]),
        ("date", pa.array([dt.date(1, 1, 1)], pa.date64()), [dt.date(1, 1, 1)]),
        ("bytes", pa.array([b"ab"], pa.binary(2)), [b"ab"]),
        ("list<float32>", pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2))[1:], [None, [3.0, 4.0]]),
        ("list<string>", pa.array([["a"], []], pa.large_list(pa.large_string())), [["a"], []]),
        ("list<string, 2>", pa.nulls(1), [None]),
    ],
)
def test_lossless_cast_is_accepted(dtype: str, column: pa.Array, expected: list[Any]) -> None:
    """Integers of any width and every list type of Arrow are accepted."""
    cast = cast_feature(pa.chunked_array([column]), DTYPES[dtype], name="c")
    assert (cast.to_pylist(), cast.type) == (expected, DTYPES[dtype])


def test_list_with_wrong_length_or_null_element_goes_to_quarantine() -> None:
    """Other rows are stored, with the declared types."""
    emb = pa.array([[0.5, 1.0, 2.0], [1.0], [1.0, float("nan"), 2.0], None])
    empty = {name: pa.nulls(4) for name in ("price", "day", "blob", "tags", "codes")}
    prepared = prepare(block(4, emb=emb, **empty), view(), now=NOW)
    reasons = [None, "emb has not 3 elements", "emb has a null element", None]
    assert prepared[REASON].to_pylist() == reasons
    assert [prepared.schema.field(name).type for name in RICH] == [DTYPES[dtype] for dtype in RICH.values()]


def test_text_and_json_lines_are_read_as_declared() -> None:
    """CSV, JSON and SQL give the same values. A list is a JSON array in CSV, and bytes are base64."""
    text = {
        "price": ["1.5", None],
        "day": ["2026-01-31", None],
        "blob": ["AA==", None],
        "emb": ["[0.5, 1, 2]", None],
        "tags": ['["a"]', "[]"],
        "codes": [f"[{2**53 + 1}]", None],
    }
    columns = {
        name: text_column(pa.chunked_array([pa.array(values, pa.string())]), RICH[name], name=name)
        for name, values in text.items()
    }
    lines = [
        {"price": "1.5", "day": "2026-01-31", "blob": "AA==", "emb": [0.5, 1, 2], "tags": ["a"]}
        | {"codes": [2**53 + 1]},
        {"tags": []},
    ]
    from_json_lines = typed_rows(lines, RICH)
    expected = prepare(block(), view(), now=NOW)
    for name in RICH:
        assert columns[name].to_pylist() == from_json_lines[name].to_pylist() == expected[name].to_pylist()
    native = {"price": Decimal("1.5"), "day": dt.date(2026, 1, 31), "blob": memoryview(b"\x00")}
    from_sql = typed_rows([native | {"emb": "[0.5, 1, 2]", "tags": ["a"], "codes": [1]}], RICH)
    for name in ("price", "day", "blob", "emb", "tags"):
        assert from_sql[name][0] == from_json_lines[name][0]
    with pytest.raises(SchemaMismatch, match=r"'price' should be decimal.*1 of 1 values"):
        typed_rows([{"price": 1.25}], RICH)


@pytest.mark.parametrize(
    "make",
    [
        lambda: view([Range("day", minimum=0)]),
        lambda: view([Range("emb", minimum=0)]),
        lambda: view([Allowed("price", values=[1])]),
        lambda: view([Pattern("blob", pattern="a")]),
        lambda: view([Outlier("price")]),
        lambda: view([Drift("emb")]),
        lambda: view([Drift("day")]),
        lambda: view([Unique(["person_id", "tags"])]),
        *(
            lambda name=name: view(
                event_id="no",
                fields={"no": "string", **RICH},
                aggregations=[Aggregation(name, "last", windows=[timedelta(days=1)])],
            )
            for name in ("price", "blob", "emb", "tags")
        ),
        lambda: FeatureService("s", views=[view()], missing={"v__emb": Default([1.0])}),
        lambda: FeatureService("s", views=[view()], missing={"v__price": Default(1.5)}),
    ],
)
def test_unsuitable_check_window_or_default_is_refused(make: Any) -> None:
    """The definition fails for a dtype that it does not fit."""
    with pytest.raises(DefinitionError):
        make()


def test_bounds_of_decimals_are_exact() -> None:
    """Compared as floats, a value very close to a bound would count as equal."""
    rule = Range("c", minimum=0.1, maximum=1e17)
    numbers = ["0.1000000000", "0.0999999999", "100000000000000000.0000000001", None]
    column = pa.chunked_array([to_arrow(numbers, "decimal(38, 10)")])
    assert rule.failing_mask(column).to_pylist() == [False, True, True, False]


def test_profile_counts_nulls_of_rich_columns() -> None:
    """Lists, bytes, decimals and dates have no distribution."""
    fields = list(view().schema)
    good = prepare(block(), view(), now=NOW)
    batch_sketch = sketch(good, good, fields)
    batch_bins = choose_bins([batch_sketch])
    batch_profile = profile([batch_sketch], batch_bins, [count(good, batch_bins)])
    assert (batch_profile.nulls["price"], batch_profile.nulls["tags"]) == (1, 0)
    assert batch_profile.distributions == {}


def test_row_hash_of_lists_does_not_depend_on_the_arrow_type() -> None:
    """Hashes of an older release are still recognised."""
    table = pa.table({"a": [[1.0, 2.0], None, []], "s": [["x"], [None], []]})
    large = pa.schema([("a", pa.large_list(pa.float64())), ("s", pa.large_list(pa.large_string()))])
    assert row_hash(table.cast(large)) == row_hash(table)
    changed = [
        pa.table({"a": [[1.0], None, [2.0]], "s": table["s"]}),
        pa.table({"a": [[1.0, 2.5], None, []]}),
    ]
    assert len({row_hash(other) for other in (table, *changed)}) == 3
    old = pa.table({"a": pa.array([[1.0, None], None, []]), "s": ["x", None, "z"]})
    before = "6c843d7cacf4d9af160c4c3006bab98713677422511ca1e5bd31da4caddeb6d5"
    old = old.append_column("d", pa.array([1, None, 3], pa.date32()))
    assert has_row_hash(old, before)
    assert not has_row_hash(table, before)
