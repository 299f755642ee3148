"""Buckets are part of the format of tables on disk: a key has the same bucket in every release."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.security.encryption.parquet import WHOLE_FILE_BYTES
from cluster.storage import Layout
from feature_jobs import view_tables
from feature_jobs.store.offline.bucket_join import _pieces
from feature_jobs.store.offline.buckets import BUCKET_VALUES, bucket_of
from feature_jobs.store.offline.tables import BucketFile
from feature_jobs.view_tables import stored_columns
from tests.projects.views import make_spec

VIEW = make_spec("income", ["person_id"], amount="float64")
GOLDEN = [[7, 6, 4, 7, 4, 6], [4, 3, 2, 0, 6], [6, 0]]


def test_buckets_of_known_keys_never_change() -> None:
    """Golden values. A change here makes every existing table unreadable."""
    numbers = pa.table({"k": pa.array([0, 1, 2, -1, 2**62, None], pa.int64())})
    texts = pa.table({"k": pa.array(["", "a", "25-34", "falaj", None])})
    both = pa.table({"a": pa.array(["25-34", "65+"]), "b": pa.array(["bachelor", "none"])})
    keyed = ((numbers, ["k"]), (texts, ["k"]), (both, ["a", "b"]))
    assert [bucket_of(table, keys, num_buckets=8).tolist() for table, keys in keyed] == GOLDEN


def test_neighbouring_ids_scatter_evenly() -> None:
    """Serial numbers are spread: each bucket is within five standard deviations of its share."""
    buckets = bucket_of(pa.table({"k": pa.array(range(80_000), pa.int64())}), ["k"], num_buckets=8)
    assert np.abs(np.bincount(buckets) - 10_000).max() < 5 * np.sqrt(80_000 * 1 / 8 * 7 / 8)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | st.text()), min_size=1, max_size=8
    )
)
def test_bucket_depends_on_the_row_alone(rows: list[tuple[int | None, str | None]]) -> None:
    """Other rows, chunks and the order of rows do not change a row's bucket."""
    table = _table(rows)
    expected = bucket_of(table, ["n", "s"], num_buckets=7).tolist()
    chunked = pa.concat_tables([_table([row]) for row in rows])
    assert expected == bucket_of(chunked, ["n", "s"], num_buckets=7).tolist()
    assert expected[::-1] == bucket_of(_table(rows[::-1]), ["n", "s"], num_buckets=7).tolist()


def _table(rows: list[tuple[int | None, str | None]]) -> pa.Table:
    numbers, texts = zip(*rows, strict=True)
    return pa.table({"n": pa.array(numbers, pa.int64()), "s": pa.array(texts, pa.string())})


def test_rebucketing_is_advised_only_for_buckets_with_too_many_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small table with one bucket is not, although a new table would have eight."""
    advice = {}
    for num_buckets, values in ((1, 1), (1, 1.5), (1, 5), (8, 33)):
        rows = int(BUCKET_VALUES * values) // stored_columns(VIEW)
        file = BucketFile(path="f", bucket=0, rows=rows, size_bytes=1)
        table = SimpleNamespace(rows=file.rows, num_buckets=num_buckets)
        monkeypatch.setattr(view_tables, "view_snapshot", lambda *_, table=table: table)
        advice[num_buckets, values] = view_tables.rebucket_advice(VIEW, Layout(""), cast(Any, None))
    assert advice[1, 1] == ""
    assert "makes 8 buckets" in advice[1, 1.5]
    assert "makes 8 buckets" in advice[1, 5]
    assert "makes 64 buckets" in advice[8, 33]


def test_pieces_of_a_bucket_are_bounded_in_rows_bytes_and_files() -> None:
    """A remote piece with large values is no larger than one of its files may be."""
    sizes = [(1, WHOLE_FILE_BYTES // 2)] * 3 + [(60, 1), (60, 1)] + [(0, 1)] * 70
    files = tuple(
        BucketFile(path=str(number), bucket=number == 0, rows=rows, size_bytes=size_bytes)
        for number, (rows, size_bytes) in enumerate([(1, 1), *sizes])
    )
    pieces = _pieces(cast(Any, SimpleNamespace(files=files)), 0, 100)
    assert [len(piece.files) for piece in pieces] == [2, 2, 64, 7]
