"""Compare-and-set in the online store.

The row with the greatest (event, created, seq) stays, in any order of writes. Every test runs on both engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import SourceError
from cluster.security.keys.keyring import Keyring
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.online.engine import Rows
from feature_jobs.store.online.reader import epoch_microseconds, open_online_store
from feature_jobs.store.online.redis_engine import RedisEngine
from feature_jobs.store.online.rows import Horizon, OnlineRow
from feature_jobs.store.online.store import FoundRow, OnlineStore
from feature_jobs.store.types.schema import PROVISIONAL
from tests.projects.online import open_store, reader_of
from tests.projects.views import make_spec

START = datetime(2024, 1, 1, tzinfo=UTC)
KEY_TYPES = {"id": "int64"}
PERSONS = [(1,), (2,), (3,)]


def a_view(version: str = "v1", **fields: str) -> ViewSpec:
    return make_spec("v", ["id"], version=version, **fields)


VIEW = a_view(amount="float64", sector="string/personal")


def row(
    key: int, event: int, value: float | None = 0.0, *, created: int | None = None, seq: int = 0
) -> OnlineRow:
    """Return a row. Without a value it is a tombstone."""
    return OnlineRow(
        keys=(key,),
        event_us=event,
        created_us=event if created is None else created,
        seq=seq,
        values=() if value is None else (value, f"s{value}"),
        deleted=value is None,
    )


@pytest.fixture
def store(config: OnlineConfig, tmp_path: Path, keys: Keyring) -> Iterator[OnlineStore]:
    with contextlib.closing(open_store(tmp_path, keys, config)) as opened:
        yield opened


def answers(store: OnlineStore, view: ViewSpec = VIEW) -> list[FoundRow | None]:
    """Return the stored row of each person, with the values as a list."""
    rows = store.get(view, PERSONS)
    return [None if row_found is None else (*row_found[:3], list(row_found[3])) for row_found in rows]


def amounts(store: OnlineStore) -> list[float | None]:
    return [None if row_found is None else row_found[3][0] for row_found in answers(store)]


def test_late_event_never_overwrites_newer_value(store: OnlineStore) -> None:
    """The later event wins, then the later created time, then the greater number. An equal row is not written."""
    assert store.put(VIEW, KEY_TYPES, [row(1, 5, 1.0, created=6, seq=2)]) == 1
    older = [(4, 9, 9), (5, 5, 9), (5, 6, 1), (5, 6, 2)]
    for event, created, seq in older:
        assert store.put(VIEW, KEY_TYPES, [row(1, event, 2.0, created=created, seq=seq)]) == 0
    assert amounts(store) == [1.0, None, None]
    for number, (event, created, seq) in enumerate([(5, 6, 3), (5, 7, 0), (6, 0, 0)]):
        assert store.put(VIEW, KEY_TYPES, [row(1, event, float(number), created=created, seq=seq)]) == 1
    assert answers(store)[0] == (6, 6, True, [2.0, "s2.0"])


def test_times_before_1970_are_ordered(store: OnlineStore) -> None:
    """The smallest and the greatest numbers are ordered too."""
    for event in (-(2**63), -1, 0, 2**63 - 1):
        assert store.put(VIEW, KEY_TYPES, [row(1, event, 1.0)]) == 1
        assert store.put(VIEW, KEY_TYPES, [row(1, max(event - 1, -(2**63)), 1.0)]) == 0


def test_older_row_does_not_restore_a_deleted_entity(store: OnlineStore) -> None:
    """Only a newer row restores it."""
    store.put(VIEW, KEY_TYPES, [row(1, 5, 1.0), row(2, 5, 1.0)])
    store.put(VIEW, KEY_TYPES, [row(1, 6, None)])
    assert store.put(VIEW, KEY_TYPES, [row(1, 5, 3.0, seq=7)]) == 0
    assert amounts(store) == [None, 1.0, None]
    store.put(VIEW, KEY_TYPES, [row(1, 7, 4.0)])
    assert amounts(store) == [4.0, 1.0, None]


def test_rows_of_one_call_may_have_any_order(store: OnlineStore) -> None:
    """Of two rows of one entity, the greater one stays."""
    store.put(VIEW, KEY_TYPES, [row(1, 6, 2.0), row(1, 5, 1.0), row(2, 1, 1.0)])
    assert amounts(store) == [2.0, 1.0, None]


events = st.integers(0, 3)
rows = st.lists(
    st.tuples(st.integers(1, 3), events, events, st.one_of(st.none(), st.floats(0, 9))), max_size=12
).map(
    lambda drawn: [
        row(key, event, value, created=created, seq=seq)
        for seq, (key, event, created, value) in enumerate(drawn)
    ]
)


def greatest(known: Sequence[OnlineRow]) -> list[OnlineRow]:
    """Return the greatest row of each entity."""
    best: dict[tuple[int | str, ...], OnlineRow] = {}
    for candidate in sorted(known, key=lambda each: (each.event_us, each.created_us, each.seq)):
        best[candidate.keys] = candidate
    return list(best.values())


@given(rows, st.data())
def test_any_order_of_pushes_and_a_materialisation_gives_the_same_store(
    redis_url: str, keys: Keyring, lmdb: OnlineStore, known: list[OnlineRow], data: st.DataObject
) -> None:
    """Rows put before and after a materialisation give the same store as one materialisation of all rows."""
    config = OnlineConfig(kind=OnlineKind.redis, url=redis_url, prefix="property")
    remote = open_online_store(config, Layout(""), keys)
    horizon = Horizon(data.draw(st.integers(-1, len(known)), label="horizon"), -1)
    covered = [candidate for candidate in known if horizon.covers(candidate.seq)]
    uncovered = [candidate for candidate in known if not horizon.covers(candidate.seq)]
    some = st.lists(st.sampled_from(known), unique_by=id) if known else st.just([])
    before, after = data.draw(some, label="before"), data.draw(st.permutations(uncovered), label="after")
    for store in (lmdb, remote):
        store.replace(VIEW, KEY_TYPES, greatest(known))
        wanted = answers(store)
        store.replace(VIEW, KEY_TYPES, [])
        store.put(VIEW, KEY_TYPES, before)
        store.replace(VIEW, KEY_TYPES, greatest(covered), horizon=horizon)
        for candidate in after:
            store.put(VIEW, KEY_TYPES, [candidate])
        assert answers(store) == wanted
    remote.close()


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory: pytest.TempPathFactory, keys: Keyring) -> Iterator[OnlineStore]:
    with contextlib.closing(open_store(tmp_path_factory.mktemp("lmdb"), keys)) as opened:
        yield opened


def test_push_during_a_materialisation_is_kept(store: OnlineStore) -> None:
    """Rows of unknown entities are kept. For a row that it covers, the materialisation's value is used."""
    store.put(VIEW, KEY_TYPES, [row(2, 1, 1.0, seq=3)])

    def slow() -> Iterator[OnlineRow]:
        yield row(1, 1, 1.0)
        store.put(VIEW, KEY_TYPES, [row(1, 2, 2.0, seq=PROVISIONAL + 8), row(3, 2, 2.0, seq=PROVISIONAL + 9)])

    assert store.replace(VIEW, KEY_TYPES, slow(), horizon=Horizon(3, 7)) == 1
    assert amounts(store) == [2.0, None, 2.0]
    store.replace(VIEW, KEY_TYPES, [row(1, 1, 1.0)], horizon=Horizon(3, 8))
    assert amounts(store) == [1.0, None, 2.0]


def test_push_between_carry_and_switch_is_kept(store: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis tries again. In LMDB both steps are one transaction."""
    store.put(VIEW, KEY_TYPES, [row(1, 2, 2.0, seq=9)])
    if isinstance(store.engine, RedisEngine):
        put_after, pushed = store.engine._put_after, []

        def put_after_then_push(rows: bytes, recent: bytes, after: bytes) -> Rows:
            recent_rows = put_after(rows, recent, after)
            if not pushed:
                pushed.append(store.put(VIEW, KEY_TYPES, [row(1, 3, 3.0, seq=10), row(2, 3, 3.0, seq=11)]))
            return recent_rows

        monkeypatch.setattr(store.engine, "_put_after", put_after_then_push)
        store.replace(VIEW, KEY_TYPES, [], horizon=Horizon(8, -1))
        assert amounts(store) == [3.0, 3.0, None]
    else:
        store.replace(VIEW, KEY_TYPES, [], horizon=Horizon(8, -1))
        assert amounts(store) == [2.0, None, None]


def test_second_of_two_concurrent_materialisations_is_refused(store: OnlineStore) -> None:
    """Otherwise the one that switches last would replace new rows by old ones."""
    store.replace(VIEW, KEY_TYPES, [row(1, 1, 1.0)])

    def slow() -> Iterator[OnlineRow]:
        yield row(1, 1, 2.0)
        store.replace(VIEW, KEY_TYPES, [row(1, 1, 3.0)])

    with pytest.raises(SourceError, match="materialised by another job at the same time"):
        store.replace(VIEW, KEY_TYPES, slow())
    assert amounts(store) == [3.0, None, None]


def test_replica_with_a_cached_old_generation_uses_the_new_one(store: OnlineStore, keys: Keyring) -> None:
    """Its cached keys and layouts belong to rows that do not exist any more."""
    replica = OnlineStore(store.engine, keys)
    store.replace(VIEW, KEY_TYPES, [row(1, 1, 1.0)])
    assert amounts(replica) == [1.0, None, None]
    store.replace(VIEW, KEY_TYPES, [row(1, 1, 1.5)])
    assert replica.put(VIEW, KEY_TYPES, [row(2, 1, 2.0)]) == 1
    assert amounts(replica) == amounts(store) == [1.5, 2.0, None]


def test_pushed_row_gets_its_sequence_number_if_still_newest(store: OnlineStore) -> None:
    """Until then its provisional number is greater than every `ingest_seq`."""
    first, second = row(1, 5, 1.0, seq=PROVISIONAL + 1), row(2, 5, 1.0, seq=PROVISIONAL + 2)
    store.put(VIEW, KEY_TYPES, [first, second])
    assert store.put(VIEW, KEY_TYPES, [row(1, 5, 9.0, seq=10**12)]) == 0
    store.put(VIEW, KEY_TYPES, [row(2, 6, 7.0, seq=3)])
    assert store.assign_sequence(VIEW, KEY_TYPES, [(first, 20), (second, 21)]) == 1
    assert amounts(store) == [1.0, 7.0, None]
    assert store.assign_sequence(VIEW, KEY_TYPES, [(first, 20), (second, 21)]) == 0
    assert store.put(VIEW, KEY_TYPES, [row(1, 5, 2.0, seq=21)]) == 1


def test_view_versions_share_the_store(store: OnlineStore) -> None:
    """Each row names the version that wrote it. Every version reads all rows, and no row is rewritten."""
    store.replace(VIEW, KEY_TYPES, [row(1, 1, 1.0)])
    newer = a_view("v2", sector="string/personal", added="int64/sensitive", amount="float64")
    written = OnlineRow(keys=(2,), event_us=1, created_us=1, seq=1, values=("s", 7, 2.0))
    assert store.put(newer, KEY_TYPES, [written]) == 1
    assert store.put(VIEW, KEY_TYPES, [row(3, 1, 3.0)]) == 1
    older, newest = ([found[3] for found in answers(store, view) if found] for view in (VIEW, newer))
    assert older == [[1.0, "s1.0"], [2.0, "s"], [3.0, "s3.0"]]
    assert newest == [["s1.0", None, 1.0], ["s", 7, 2.0], ["s3.0", None, 3.0]]


def test_every_type_and_null_is_read_back_unchanged(store: OnlineStore) -> None:
    """With and without a fixed width, alone in its class or not."""
    dtypes = ("bool", "int32", "int64", "float32", "float64", "timestamp")
    fixed = a_view("v2", **{f"f_{dtype}": dtype for dtype in dtypes})
    values = (True, -(2**31), 2**63 - 1, 0.5, 1e300, epoch_microseconds(START))
    mixed = a_view("v3", name="string/personal", flag="bool/public", amount="float64/sensitive")
    for view, content in ((fixed, values), (mixed, ("é", False, float("inf")))):
        nulls = tuple(None if index % 2 else value for index, value in enumerate(content))
        rows = [
            OnlineRow(keys=(key,), event_us=int(view.version[1]), created_us=0, seq=0, values=values)
            for key, values in ((1, content), (2, nulls))
        ]
        store.put(view, KEY_TYPES, rows)
        stored = [(found[2], tuple(found[3])) for found in store.get(view, PERSONS) if found]
        assert stored == [(True, content), (False, nulls)]


@pytest.mark.parametrize(
    ("seen_at", "states"),
    [
        (START.replace(hour=0), ["newer", "newer", "newer", "newer"]),
        (START.replace(hour=2), ["present", "null", "newer", "missing"]),
        (START.replace(hour=4), ["expired", "expired", "newer", "missing"]),
        (START.replace(hour=6), ["expired", "expired", "present", "missing"]),
    ],
)
def test_batch_has_the_status_of_each_row(store: OnlineStore, seen_at: object, states: list[str]) -> None:
    """Present, null, expired, newer and deleted rows in one read, each as of the request's time."""
    view = dataclasses.replace(VIEW, ttl_s=7200)
    hour = [epoch_microseconds(START.replace(hour=number)) for number in range(8)]
    some = OnlineRow(keys=(2,), event_us=hour[1], created_us=hour[1], seq=0, values=(None, None))
    store.put(view, KEY_TYPES, [row(1, hour[1], 1.0), some, row(3, hour[5], 3.0), row(4, hour[1], None)])
    entities = [{"id": key} for key in (1, 2, 3, 4)]
    vectors = reader_of(store, view).read(entities, seen_at)  # type: ignore[arg-type]
    assert vectors.status["v__amount"] == states
    values = zip([1.0, None, 3.0, None], states, strict=True)
    expected = [value if state == "present" else None for value, state in values]
    assert vectors.columns["v__amount"] == expected


@pytest.mark.parametrize(
    "dtypes", [("float64",) * 3, ("float64", "int64", "bool"), ("int64", "string", "bool")]
)
@given(
    drawn=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=5, max_size=12),
    complete=st.booleans(),
    at=st.integers(0, 4),
)
def test_batch_read_equals_single_reads(
    keys: Keyring, dtypes: tuple[str, ...], drawn: list[tuple[int, bool]], complete: bool, at: int
) -> None:
    """By column or by row; with and without nulls, missing entities and expired rows."""
    makers = {"float64": float, "int64": int, "bool": lambda number: number % 2 == 0, "string": str}
    fields = {f"f{index}": dtype for index, dtype in enumerate(dtypes)}
    view = dataclasses.replace(a_view(**fields), ttl_s=2.0)
    moment = START + timedelta(seconds=at)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder), keys)
        rows = []
        for key, (second, null) in enumerate(drawn):
            values = [None if null and not complete else makers[dtype](key) for dtype in dtypes]
            event = epoch_microseconds(START + timedelta(seconds=second))
            rows.append(OnlineRow(keys=(key,), event_us=event, created_us=event, seq=0, values=values))
        store.put(view, KEY_TYPES, rows)
        requests = [{"id": key} for key in range(len(drawn) + (not complete))]
        reader = reader_of(store, view)
        batch, alone = reader.read(requests, moment), [reader.read([single], moment) for single in requests]
        store.close()
    for name in view.columns:
        assert batch.columns[name] == [single.columns[name][0] for single in alone]
        assert list(map(type, batch.columns[name])) == [type(single.columns[name][0]) for single in alone]
        assert list(batch.status[name]) == [single.status[name][0] for single in alone]
