"""What a batch must look like, what is cast, what is refused, and what only goes to quarantine."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import SchemaMismatch, SourceError
from feature_jobs.store import Allowed, Entity, FeatureView, Field, FileSource, NotNull, Pattern, Range
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare

NOW = datetime(2024, 6, 1, tzinfo=UTC)
AT = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", "UTC")


def view(dtype: str = "float64", **changes: Any) -> FeatureView:
    """A view of one feature, `amount`."""
    parts: dict[str, Any] = {
        "entities": [Entity("person", join_keys=["person_id"])],
        "source": FileSource("x.parquet", event_timestamp="at"),
        "schema": [Field("amount", dtype)],
    }
    return FeatureView("income", **(parts | changes))


def block(amount: Any, *, keys: Any = None, at: Any = None, **more: Any) -> pa.Table:
    """A source block; times and keys are right unless given."""
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
def test_lossless_cast_is_made(source: pa.Array, dtype: str, expected: list[Any]) -> None:
    """A source may be narrower, wider or coded, as long as every value stays what it is."""
    assert expected == prepare(block(source), view(dtype), now=NOW)["amount"].to_pylist()


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
def test_wrong_dtype_refuses_naming_column_expected_and_actual(
    source: pa.Array, dtype: str, actual: str
) -> None:
    """A value is never changed to fit."""
    with pytest.raises(SchemaMismatch, match="'amount'") as caught:
        prepare(block(source), view(dtype), now=NOW)
    expected = {"float64": "double", "float32": "float"}.get(dtype, dtype)
    assert f"should be {expected}" in str(caught.value)
    assert actual in str(caught.value)


def test_renamed_column_is_refused_with_a_guess() -> None:
    """Whoever renamed it sees which one was meant."""
    with pytest.raises(SchemaMismatch, match=r"Column 'amount'.*is missing.*Did you mean 'amounts'"):
        prepare(block([1.0]).rename_columns(["person_id", "amounts", "at"]), view(), now=NOW)


def test_column_that_stands_twice_is_refused() -> None:
    """Nobody could say which one is meant."""
    twice = block([1.0], extra=pa.array([2.0])).rename_columns(["person_id", "amount", "at", "amount"])
    with pytest.raises(SchemaMismatch, match="2 columns 'amount'"):
        prepare(twice, view(), now=NOW)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        (pa.array([7_341_905_220]), "int32"),
        (pa.array([7341905.5]), "int64"),
        (pa.array(["7341905 Jane"]).dictionary_encode(), "int64"),
    ],
)
def test_refusal_does_not_quote_the_value_that_would_change(source: pa.Array, dtype: str) -> None:
    """It stands in the ledger, which is for everybody who audits and forever."""
    with pytest.raises(SchemaMismatch, match="a value would change") as refusal:
        prepare(block(source), view(dtype), now=NOW)
    assert "7341905" not in str(refusal.value)


def test_column_of_mixed_values_is_refused_with_its_type() -> None:
    """Numbers and a word in one column arrive as text, and are not guessed at."""
    with pytest.raises(SchemaMismatch, match="'amount' should be double, the source has string"):
        prepare(block(pa.array(["1.5", "n/a"])), view(), now=NOW)


def test_text_that_is_no_utf8_is_refused() -> None:
    """It would be stored unseen, and fail whoever reads it."""
    with pytest.raises(SchemaMismatch, match="'amount' holds text that is not UTF-8"):
        prepare(block(not_utf8()), view("string"), now=NOW)


@pytest.mark.parametrize(
    ("check", "keys"),
    [
        (Range("person_id", minimum=0), pa.array(["a"])),
        (Allowed("person_id", values=["a"]), pa.array([1])),
        (Pattern("person_id", "a"), pa.array([1])),
    ],
)
def test_rule_that_does_not_fit_a_key_is_refused_by_name(check: Any, keys: pa.Array) -> None:
    """Which type a key has is known only from the source."""
    with pytest.raises(SchemaMismatch, match=f"rule {type(check).__name__} does not fit column .*'person_id'"):
        prepare(block([1.0], keys=keys), view(checks=[check]), now=NOW)


def not_utf8() -> pa.Array:
    """Two bytes of Latin-1 as text."""
    offsets = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0]))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])


@pytest.mark.parametrize("name", ["person_id", "amount", "at"])
def test_missing_column_is_named(name: str) -> None:
    """Key, feature or timestamp: the message says which."""
    with pytest.raises(SchemaMismatch, match=f"Column '{name}'.*is missing"):
        prepare(block([1.0]).drop_columns([name]), view(), now=NOW)


def test_float_keys_are_refused() -> None:
    """A float cannot identify anything."""
    with pytest.raises(SchemaMismatch, match="'person_id'"):
        prepare(block([1.0], keys=pa.array([0.5])), view(), now=NOW)


def reasons(batch: pa.Table, **changes: Any) -> list[str | None]:
    """Why each row is bad."""
    found: list[str | None] = prepare(batch, view(**changes), now=NOW)[REASON].to_pylist()
    return found


def test_rule_fails_only_the_rows_that_break_it() -> None:
    """Bounds are included, null passes all rules but NotNull."""
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


def test_row_with_two_faults_names_both() -> None:
    """All that is wrong with a row is said at once."""
    batch = block([-1.0], keys=pa.array([None], pa.int64()))
    assert reasons(batch, checks=[Range("amount", minimum=0)]) == ["person_id is null; amount outside 0.."]


def test_time_that_is_absent_or_far_ahead_is_a_bad_row() -> None:
    """A minute's slack for clocks, no more."""
    at = pa.array([None, NOW + timedelta(seconds=60), NOW + timedelta(seconds=61)], TIME)
    said = reasons(block([1.0, 1.0, 1.0], at=at))
    assert said[1] is None
    assert "event_timestamp is null" in str(said[0])
    assert "event_timestamp lies in the future" in str(said[2])


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (pa.array([10**14], pa.timestamp("s")), "lies in the future"),
        (pa.array([2**31 - 1], pa.date32()), "lies in the future"),
        (pa.array([-(10**14)], pa.timestamp("s")), "lies before the year 1"),
        (pa.array([316_537_891_200_000_000], pa.timestamp("us")), "lies in the future"),
        (pa.array([-(10**18)], pa.timestamp("us")), "lies before the year 1"),
    ],
)
def test_time_beyond_all_calendars_is_a_bad_row(at: pa.Array, said: str) -> None:
    """Of any unit: neither a crash nor a time that wrapped around into the past."""
    found = prepare(block([1.0], at=at), view(), now=NOW)
    assert f"event_timestamp {said}" in found[REASON][0].as_py()
    assert (
        json.loads(found[RAW][0].as_py())["at"]
        == at.cast(pa.int64() if at.type != pa.date32() else pa.int32())[0].as_py()
    )


def test_nothing_is_known_before_it_was_true() -> None:
    """Event and created times are rounded up to the microsecond; without a zone they are read in the source's."""
    first = int(AT.timestamp()) * 10**9
    at = pa.array([first, first + 1], pa.timestamp("ns", "UTC"))
    source = FileSource("x.parquet", event_timestamp="at", created_timestamp="known")
    found = prepare(block([1.0, 2.0], at=at, known=at), view(source=source), now=NOW)
    later = AT + timedelta(microseconds=1)
    assert found["event_timestamp"].to_pylist() == [AT, later]
    assert found["created_timestamp"].to_pylist() == [AT, later]
    local = FileSource("x.parquet", event_timestamp="at", zone="Asia/Dubai")
    bare = pa.array([AT.replace(tzinfo=None)], pa.timestamp("us"))
    found = prepare(block([1.0], at=bare), view(source=local), now=NOW)
    assert found["event_timestamp"].to_pylist() == [AT - timedelta(hours=4)]


def test_time_of_a_feature_is_never_changed_to_fit() -> None:
    """What a feature says beyond the calendar refuses the batch."""
    far = pa.array([10**14], pa.timestamp("s"))
    with pytest.raises(SchemaMismatch, match=r"'amount'.*years 1 to 9999"):
        prepare(block(far), view("timestamp"), now=NOW)


def test_what_cannot_be_printed_is_kept_in_a_plainer_form() -> None:
    """A column that the view does not even read must not lose a bad row."""
    batch = block([1.0], keys=pa.array([None], pa.int64()), note=not_utf8())
    assert json.loads(prepare(batch, view(), now=NOW)[RAW][0].as_py())["note"] == "//4="


def test_bad_row_keeps_what_the_source_said() -> None:
    """The quarantine can be mended from: the raw row, columns outside the schema included."""
    batch = block([-1.0, 1.0], note=pa.array(["typed twice", "fine"]))
    found = prepare(batch, view(checks=[Range("amount", minimum=0)]), now=NOW)
    first, second = found[RAW].to_pylist()
    assert second is None
    assert (json.loads(first)["note"], json.loads(first)["amount"]) == ("typed twice", -1.0)


def test_created_is_event_plus_lag_where_the_source_does_not_say() -> None:
    """Per view without the column, and per row where it is null."""
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
def test_transform_that_cannot_be_trusted_refuses_the_batch(transform: Any, words: str) -> None:
    """An error inside, or rows lost: the batch is refused, not cut short."""
    with pytest.raises(SourceError, match=words):
        prepare(block([1.0, 2.0]), view(transform=transform), now=NOW)


def test_empty_block_is_fine() -> None:
    """Ray Data may hand over a block without rows."""
    empty = block([1.0]).slice(0, 0)
    assert prepare(empty, view(checks=[Range("amount", minimum=0)]), now=NOW).num_rows == 0


GONE = FileSource("x.parquet", event_timestamp="at", deleted="gone")


def test_a_tombstone_needs_its_keys_and_times_only() -> None:
    """Its values are null, whatever the source says, and no check looks at them; null is not deleted."""
    rules = [NotNull("amount"), Range("amount", minimum=0)]
    amount = pa.array([-1.0, None, -1.0, 1.0])
    table = prepare(
        block(amount, gone=pa.array([True, True, False, None])), view(source=GONE, checks=rules), now=NOW
    )
    assert table["amount"].to_pylist() == [None, None, -1.0, 1.0]
    assert table["deleted"].to_pylist() == [True, True, False, False]
    assert table[REASON].to_pylist() == [None, None, "amount outside 0..", None]


def test_a_tombstone_without_key_or_in_the_future_goes_to_quarantine() -> None:
    """It is known whose it is and since when, or it deletes nothing."""
    keys, at = pa.array([None, 1]), pa.array([AT, NOW + timedelta(days=9)], TIME)
    table = prepare(
        block([None, 1.0], keys=keys, at=at, gone=pa.array([True, True])), view(source=GONE), now=NOW
    )
    assert table[REASON].null_count == 0


def test_value_of_a_tombstone_may_be_of_any_kind_the_column_has() -> None:
    """It is dropped before it is cast: a code without meaning refuses no batch."""
    coded = pa.array(["16", "?"]).dictionary_encode()
    table = prepare(block(coded, gone=pa.array([False, True])), view("int64", source=GONE), now=NOW)
    assert table["amount"].to_pylist() == [16, None]


def test_marker_of_tombstones_that_is_no_bool_is_refused() -> None:
    """Text or numbers would have to be guessed at."""
    with pytest.raises(SchemaMismatch, match="'gone' should be bool"):
        prepare(block([1.0], gone=["yes"]), view(source=GONE), now=NOW)
    with pytest.raises(SchemaMismatch, match="'gone'"):
        prepare(block([1.0]), view(source=GONE), now=NOW)
