"""Addresses of entities: the same alone and in a batch, for every kind of key, and secret without the hash key."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import OnlineStoreOutdated
from feature_jobs.store.online.addresses import ADDRESS_BYTES, Addresses
from feature_jobs.store.online.changes import Change
from feature_jobs.store.online.meta import STAMP_BYTES
from feature_jobs.store.online.rows import OnlineRow
from tests.projects.online import online_keys, open_store, reader_of
from tests.projects.views import make_spec

SECRET = bytes(range(32))
numbers = st.integers(-(2**63), 2**64 - 1)
keys = st.one_of(
    st.lists(st.tuples(numbers), unique=True, max_size=9),
    st.lists(st.tuples(st.text(max_size=9)), unique=True, max_size=9),
    st.lists(st.tuples(numbers, st.one_of(numbers, st.just("a"))), unique=True, max_size=9),
)


@given(keys)
def test_address_is_the_same_alone_and_in_a_batch(entities: list[tuple[int | str, ...]]) -> None:
    """Keys with any parts have one address. Different entities have different addresses."""
    of = Addresses(SECRET).of
    together = list(of(entities))
    assert together == [Addresses(SECRET).of([entity])[0] for entity in entities]
    assert {len(address) for address in together} <= {ADDRESS_BYTES}
    assert len(set(together)) == len(entities)


def test_keys_of_different_types_have_different_addresses() -> None:
    """A number, its text, and a pair have different addresses, whether they are encrypted or hashed."""
    of = Addresses(SECRET).of
    entities = [(1,), ("1",), (1, 0), (0, 1), (2**63,), (-(2**63),), (1, ""), ("",), (0,)]
    assert len({of([entity])[0] for entity in entities}) == len(entities)


@given(st.lists(st.tuples(numbers), min_size=1, unique=True, max_size=9))
def test_another_secret_gives_other_addresses(entities: list[tuple[int]]) -> None:
    """Without the secret, an address cannot be connected to an entity."""
    assert not set(Addresses(SECRET).of(entities)) & set(Addresses(bytes(32)).of(entities))


def test_threads_get_the_right_addresses() -> None:
    """A replica reads in several threads, but the cipher's context allows one at a time."""
    of = Addresses(SECRET).of
    batches = [[(number,) for number in range(first, first + first % 7 + 1)] for first in range(2_000)]
    expected = [list(of(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert [list(addresses) for addresses in pool.map(of, batches)] == expected


VIEW = make_spec("v", ["id"], amount="float64")
AT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def row(value: float) -> OnlineRow:
    return OnlineRow(keys=(1,), event_us=1, created_us=1, seq=0, values=[value])


def test_rows_of_an_older_release_are_refused_until_materialised(tmp_path: Path) -> None:
    """They have other addresses. Without the check, every entity would be missing."""
    keys = online_keys(tmp_path, "v")
    store = open_store(tmp_path, keys)
    store.replace(VIEW, {"id": "int64"}, [row(1.0)])
    stored = store.engine.meta("v")
    assert stored is not None
    stamp, content = stored[:STAMP_BYTES], msgpack.unpackb(stored[STAMP_BYTES:])
    assert content.pop("format") == 2
    store.engine.set_meta("v", stamp, stamp + msgpack.packb(content))  # as the older release wrote it
    store.close()

    store = open_store(tmp_path, keys)
    reader = reader_of(store, VIEW)
    attempts: list[Callable[[], object]] = [
        lambda: reader.read([{"id": 1}], AT),
        lambda: store.put(VIEW, {"id": "int64"}, [row(3.0)]),
        lambda: store.update(VIEW, {"id": "int64"}, [Change((1,), lambda before, whole: before)]),
    ]
    for attempt in attempts:
        with pytest.raises(OnlineStoreOutdated, match=r"feature_jobs\.materialize view=v"):
            attempt()
    store.replace(VIEW, {"id": "int64"}, [row(2.0)])
    assert reader.read([{"id": 1}], AT).columns == {"v__amount": [2.0]}
    store.close()
