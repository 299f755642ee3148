"""Validation of a batch: what is cast, what refuses the batch, and which rows go to quarantine."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import SchemaMismatch, SourceError
from feature_jobs.store import Allowed, FeatureView, Field, FileSource, NotNull, Pattern, Range
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare
from tests.projects.views import make_view

NOW = datetime(2024, 6, 1, tzinfo=UTC)
AT = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", "UTC")


def view(dtype: str = "float64", **changes: Any) -> FeatureView:
    """Return a view with one feature, `amount`."""
    return make_view(**({"schema": [Field("amount", dtype)]} | changes))


def block(amount: Any, *, keys: Any = None, at: Any = None, **more: Any) -> pa.Table:
    """Return a source block, with valid times and keys by default."""
    amount = amount if isinstance(amount, pa.Array) else pa.array(amount)
    keys = pa.array(range(len(amount))) if keys is None else keys
    at = pa.array([AT] * len(amount), TIME) if at is None else at
    return pa.table({"person_id": keys, "amount": amount, "at": at, **more})


@pytest.mark.parametrize(
    ("source", "dtype", "expected"),
    [
        (pa.array([1, None], pa.int32()), "int64", [1, None]),
        (pa.array([1, 2], pa.uint8()), "int32", [1, 2]),
        (pa.array([1, 2], pa.int64()), "float64", [1.0, 2.0]),
        (pa.array([1.0, None]), "int64", [1, None]),
        (pa.array([1.5, float("nan")]), "float64", [1.5, None]),
        (pa.array([1.5, None], pa.float32()), "float64", [1.5, None]),
        (pa.array([0.5], pa.float64()), "float32", [0.5]),
        (pa.array(["a", "b"]).dictionary_encode(), "string", ["a", "b"]),
        (pa.array(["16", "21", None]).dictionary_encode(), "int64", [16, 21, None]),
        (pa.array(["a"], pa.large_string()), "string", ["a"]),
        (pa.nulls(2), "string", [None, None]),
        (pa.array([date(2024, 1, 2)]), "timestamp", [datetime(2024, 1, 2, tzinfo=UTC)]),
        (pa.array([datetime(2024, 1, 2)]), "timestamp", [datetime(2024, 1, 2, tzinfo=UTC)]),
    ],
)
def test_column_is_cast_if_no_value_changes(source: pa.Array, dtype: str, expected: list[Any]) -> None:
    """The source's type may be narrower, wider or dictionary codes."""
    assert prepare(block(source), view(dtype), now=NOW)["amount"].to_pylist() == expected


@pytest.mark.parametrize(
    ("source", "dtype", "actual"),
    [
        (pa.array(["1"]), "float64", "string"),
        (pa.array(["1"]), "int64", "string"),
        (pa.array([1]), "string", "int64"),
        (pa.array([1.5]), "int64", "double"),
        (pa.array([2**40]), "int32", "int64"),
        (pa.array([2**53 + 1]), "float64", "int64"),
        (pa.array([0.1]), "float32", "double"),
        (pa.array([1]), "bool", "int64"),
        (pa.array([True]), "int64", "bool"),
        (pa.array(["x"]).dictionary_encode(), "int64", "dictionary"),
        (pa.array([20240101]), "timestamp", "int64"),
    ],
)
def test_wrong_type_is_refused_with_column_expected_and_actual_type(
    source: pa.Array, dtype: str, actual: str
) -> None:
    """A value is never changed so that it fits."""
    with pytest.raises(SchemaMismatch, match="'amount'") as refusal:
        prepare(block(source), view(dtype), now=NOW)
    expected = {"float64": "double", "float32": "float"}.get(dtype, dtype)
    assert f"should be {expected}" in str(refusal.value)
    assert actual in str(refusal.value)


GONE = FileSource("x.parquet", event_timestamp="at", deleted="gone")
FAR = pa.array([10**14], pa.timestamp("s"))
OFFSETS, LATIN_1 = (pa.py_buffer(content) for content in (bytes([0, 0, 0, 0, 2, 0, 0, 0]), b"\xff\xfe"))
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, OFFSETS, LATIN_1])
GOOD = block([1.0])


@pytest.mark.parametrize(
    ("batch", "declared", "words"),
    [
        (GOOD.drop_columns(["person_id"]), view(), "Column 'person_id'.*is missing"),
        (GOOD.drop_columns(["amount"]), view(), "Column 'amount'.*is missing"),
        (GOOD.drop_columns(["at"]), view(), "Column 'at'.*is missing"),
        (GOOD.rename_columns(["person_id", "amounts", "at"]), view(), "'amount'.* Did you mean 'amounts'"),
        (GOOD.append_column("amount", pa.array([2.0])), view(), "2 columns 'amount'"),
        (block([1.0], keys=pa.array([0.5])), view(), "'person_id'"),
        (block(NOT_UTF8), view("string"), "'amount' holds text that is not UTF-8"),
        (block(FAR), view("timestamp"), r"'amount'.*years 1 to 9999"),
        (block([1.0], gone=["yes"]), view(source=GONE), "'gone' should be bool"),
        (GOOD, view(source=GONE), "'gone'"),
    ],
)
def test_batch_that_does_not_fit_is_refused_by_column(
    batch: pa.Table, declared: FeatureView, words: str
) -> None:
    """A column that is missing, repeated or renamed, a float key, or values that no reader could use."""
    with pytest.raises(SchemaMismatch, match=words):
        prepare(batch, declared, now=NOW)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        (pa.array([7_341_905_220]), "int32"),
        (pa.array([7341905.5]), "int64"),
        (pa.array(["7341905 Jane"]).dictionary_encode(), "int64"),
    ],
)
def test_refusal_does_not_quote_the_value_that_would_change(source: pa.Array, dtype: str) -> None:
    """The ledger stores the message permanently, and every auditor can read it."""
    with pytest.raises(SchemaMismatch, match="a value would change") as refusal:
        prepare(block(source), view(dtype), now=NOW)
    assert "7341905" not in str(refusal.value)


@pytest.mark.parametrize(
    ("check", "keys"),
    [
        (Range("person_id", minimum=0), pa.array(["a"])),
        (Allowed("person_id", values=["a"]), pa.array([1])),
        (Pattern("person_id", "a"), pa.array([1])),
    ],
)
def test_rule_that_does_not_fit_a_key_is_refused_by_name(check: Any, keys: pa.Array) -> None:
    """The type of a key is known only from the source."""
    with pytest.raises(
        SchemaMismatch, match=f"rule {type(check).__name__} does not fit column .*'person_id'"
    ):
        prepare(block([1.0], keys=keys), view(checks=[check]), now=NOW)


def reasons(batch: pa.Table, **changes: Any) -> list[str | None]:
    """Return the reason of each row; None for a good row."""
    row_reasons: list[str | None] = prepare(batch, view(**changes), now=NOW)[REASON].to_pylist()
    return row_reasons


def test_rule_fails_only_the_rows_that_break_it() -> None:
    """Bounds are inclusive. A null passes all rules except NotNull."""
    checks = [Range("amount", minimum=0, maximum=10)]
    bad = "amount outside 0..10"
    assert [None, None, bad, bad, None] == reasons(block([0.0, 10.0, -0.1, 10.1, None]), checks=checks)
    assert reasons(block([1.0, None]), checks=[NotNull("amount")]) == [None, "amount is null"]
    whole = [Pattern("amount", "a|ab*")]
    expected = [None, None, "amount does not match a|ab*", "amount does not match a|ab*", None]
    assert expected == reasons(block(["a", "abb", "xa", "abc", None]), dtype="string", checks=whole)
    allowed = [Allowed("amount", values=["a"])]
    expected = [None, "amount is none of the allowed values", None]
    assert expected == reasons(block(["a", "b", None]), dtype="string", checks=allowed)


def test_row_that_breaks_two_rules_has_both_reasons() -> None:
    """The reasons are joined."""
    batch = block([-1.0], keys=pa.array([None], pa.int64()))
    assert reasons(batch, checks=[Range("amount", minimum=0)]) == ["person_id is null; amount outside 0.."]


def test_missing_time_is_a_bad_row() -> None:
    """Other rows are good."""
    at = pa.array([None, AT], TIME)
    assert reasons(block([1.0, 1.0], at=at)) == ["event_timestamp is null", None]


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (pa.array([10**14], pa.timestamp("s")), "lies in the future"),
        (pa.array([2**31 - 1], pa.date32()), "lies in the future"),
        (pa.array([-(10**14)], pa.timestamp("s")), "lies before the year 1"),
        (pa.array([316_537_891_200_000_000], pa.timestamp("us")), "lies in the future"),
        (pa.array([-(10**18)], pa.timestamp("us")), "lies before the year 1"),
    ],
)
def test_time_outside_the_calendar_is_a_bad_row(at: pa.Array, reason: str) -> None:
    """In no unit does such a time raise an error or overflow into the past."""
    prepared = prepare(block([1.0], at=at), view(), now=NOW)
    assert f"event_timestamp {reason}" in prepared[REASON][0].as_py()
    kind = pa.int32() if at.type == pa.date32() else pa.int64()
    assert json.loads(prepared[RAW][0].as_py())["at"] == at.cast(kind)[0].as_py()


def test_event_and_created_times_are_rounded_up() -> None:
    """So no value is known before it was true."""
    first = int(AT.timestamp()) * 10**9
    at = pa.array([first, first + 1], pa.timestamp("ns", "UTC"))
    source = FileSource("x.parquet", event_timestamp="at", created_timestamp="known")
    prepared = prepare(block([1.0, 2.0], at=at, known=at), view(source=source), now=NOW)
    later = AT + timedelta(microseconds=1)
    assert prepared["event_timestamp"].to_pylist() == [AT, later]
    assert prepared["created_timestamp"].to_pylist() == [AT, later]


def test_value_without_a_json_form_is_stored_as_base64() -> None:
    """So a bad row is stored even if a column that the view does not read has such a value."""
    batch = block([1.0], keys=pa.array([None], pa.int64()), note=NOT_UTF8)
    assert json.loads(prepare(batch, view(), now=NOW)[RAW][0].as_py())["note"] == "//4="


def test_bad_row_is_stored_with_all_source_columns() -> None:
    """A replay needs them, also those outside the schema."""
    batch = block([-1.0, 1.0], note=pa.array(["typed twice", "fine"]))
    prepared = prepare(batch, view(checks=[Range("amount", minimum=0)]), now=NOW)
    first, second = prepared[RAW].to_pylist()
    assert second is None
    assert (json.loads(first)["note"], json.loads(first)["amount"]) == ("typed twice", -1.0)


def test_missing_created_time_is_event_time_plus_lag() -> None:
    """This applies to a source without the column, and to rows where it is null."""
    known = pa.array([AT + timedelta(days=9), None], TIME)
    source = FileSource("x.parquet", event_timestamp="at", created_timestamp="known")
    lag = timedelta(days=2)
    batch = block([1.0, 1.0], known=known)
    declared = prepare(batch, view(source=source, created_lag=lag), now=NOW)["created_timestamp"]
    assert [AT + timedelta(days=9), AT + lag] == declared.to_pylist()
    assert prepare(batch, view(), now=NOW)["created_timestamp"].to_pylist() == [AT, AT]


def _fails(table: pa.Table) -> pa.Table:
    return table.append_column("amount2", table["no such column"])


def _drops(table: pa.Table) -> pa.Table:
    return table.slice(1)


@pytest.mark.parametrize(
    ("transform", "words"), [(_fails, "no such column"), (_drops, "one row for each of 2")]
)
def test_failing_transform_refuses_the_batch(transform: Any, words: str) -> None:
    """The transform raises an error, or loses rows."""
    with pytest.raises(SourceError, match=words):
        prepare(block([1.0, 2.0]), view(transform=transform), now=NOW)


def test_block_without_rows_is_accepted() -> None:
    """Ray Data may pass such a block."""
    empty = block([1.0]).slice(0, 0)
    assert prepare(empty, view(checks=[Range("amount", minimum=0)]), now=NOW).num_rows == 0


def test_tombstone_needs_only_its_keys_and_times() -> None:
    """Its values become null, and no check applies to them. A null in the deletion column means not deleted."""
    rules = [NotNull("amount"), Range("amount", minimum=0)]
    amount = pa.array([-1.0, None, -1.0, 1.0])
    table = prepare(
        block(amount, gone=pa.array([True, True, False, None])), view(source=GONE, checks=rules), now=NOW
    )
    assert table["amount"].to_pylist() == [None, None, -1.0, 1.0]
    assert table["deleted"].to_pylist() == [True, True, False, False]
    assert table[REASON].to_pylist() == [None, None, "amount outside 0..", None]


def test_tombstone_without_a_key_or_in_the_future_goes_to_quarantine() -> None:
    """A tombstone must have a known entity and a valid time."""
    keys, at = pa.array([None, 1]), pa.array([AT, NOW + timedelta(days=9)], TIME)
    table = prepare(
        block([None, 1.0], keys=keys, at=at, gone=pa.array([True, True])), view(source=GONE), now=NOW
    )
    assert table[REASON].null_count == 0


def test_tombstone_value_that_cannot_be_cast_is_ignored() -> None:
    """It becomes null before the cast, so it does not refuse the batch."""
    coded = pa.array(["16", "?"]).dictionary_encode()
    table = prepare(block(coded, gone=pa.array([False, True])), view("int64", source=GONE), now=NOW)
    assert table["amount"].to_pylist() == [16, None]
