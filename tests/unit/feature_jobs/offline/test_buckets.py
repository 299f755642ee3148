"""Buckets are part of the format of tables on disk: a key has the same bucket in every release."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.store.offline.buckets import bucket_of

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
