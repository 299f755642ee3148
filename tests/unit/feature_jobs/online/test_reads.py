"""The online store: what a read may see at its `as_of`, and reads during a materialisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AccessDenied, ArtifactTampered, InvalidRequest
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyRevoked, KeyStoreUnavailable
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import ServiceSpec
from feature_jobs.store.online import store as online_store
from feature_jobs.store.online.lmdb_engine import LmdbEngine
from feature_jobs.store.online.reader import FeatureReader, epoch_microseconds, open_online_store
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.online.store import OnlineStore
from tests.processes import forks
from tests.projects.online import SMALL, online_keys, open_store, reader_of
from tests.projects.views import make_spec, service_of

START = datetime(2024, 1, 1, tzinfo=UTC)
on_lmdb = pytest.mark.parametrize("config", [OnlineKind.lmdb], indirect=True)
PERSON = make_spec("person", ["person_id"], ttl_h=10, amount="float64", age_band="string")
COHORT = make_spec("cohort", ["age_band"], rate="float64")
SERVICE = service_of(PERSON, COHORT)


def hour(number: float) -> datetime:
    """Return a moment, in hours after the start."""
    return START + timedelta(hours=number)


def row(key: int | str, *values: Any, event: float = 1, available: float | None = None) -> OnlineRow:
    """Return an entity's row. By default it is created at its event time."""
    known = event if available is None else available
    return OnlineRow(
        keys=(key,),
        event_us=epoch_microseconds(hour(event)),
        created_us=epoch_microseconds(hour(known)),
        seq=0,
        values=values,
    )


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    return online_keys(tmp_path, "person", "cohort", "person2")


@pytest.fixture
def store(config: OnlineConfig, tmp_path: Path, keys: Keyring) -> Iterator[OnlineStore]:
    with contextlib.closing(open_store(tmp_path, keys, config)) as opened:
        opened.replace(PERSON, {"person_id": "int64"}, [row(1, 10.0, "young"), row(2, None, "old")])
        opened.replace(COHORT, {"age_band": "string"}, [row("young", 0.5), row("old", 0.7)])
        yield opened


def read(
    store: OnlineStore, entity: Mapping[str, Any], *, at: float = 5
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values and status of one entity, by column."""
    vectors = FeatureReader(SERVICE, store).read([entity], hour(at))
    assert SERVICE.columns == list(vectors.columns) == list(vectors.status)
    values = {name: column[0] for name, column in vectors.columns.items()}
    return values, {name: str(column[0]) for name, column in vectors.status.items()}


def test_join_key_can_come_from_an_earlier_view(store: OnlineStore) -> None:
    """Like in a training set, the person's band is the key of the cohort, unless the request has another one."""
    values, status = read(store, {"person_id": 1})
    assert values == {"person__amount": 10.0, "person__age_band": "young", "cohort__rate": 0.5}
    assert {"present"} == set(status.values())
    assert read(store, {"person_id": 1, "age_band": "old"})[0]["cohort__rate"] == 0.7


@pytest.mark.parametrize("others", [0, 64])
def test_list_of_an_earlier_length_is_read_unchanged(store: OnlineStore, others: int) -> None:
    """Like in a training set, the list is neither cut nor filled up to the declared length."""
    lists = make_spec("person2", ["person_id"], emb="list<float32, 3>", amount="float64")
    given = [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], *([1.0, 2.0, 3.0] for _ in range(others))]
    rows = [row(number, emb, 1.5) for number, emb in enumerate(given)]
    store.replace(lists, {"person_id": "int64"}, rows)
    reader = reader_of(store, lists)
    found = reader.read([{"person_id": number} for number in range(len(given))], hour(5))
    assert [list(one) for one in found.columns["person2__emb"]] == given
    assert set(found.status["person2__emb"]) == {"present"}


def test_whole_float_is_used_as_an_integer_key(store: OnlineStore) -> None:
    """Like in a training set, 10.0 is the key 10, and 0.5 is no key."""
    by_amount = make_spec("cohort", ["amount"], rate="float64")
    store.replace(by_amount, {"amount": "int64"}, [row(10, 0.9)])
    reader = reader_of(store, PERSON, by_amount)
    assert reader.read([{"person_id": 1}], hour(5)).columns["cohort__rate"] == [0.9]
    store.put(PERSON, {"person_id": "int64"}, [row(1, 0.5, "young", event=2)])
    with pytest.raises(InvalidRequest, match="amount must be a whole number"):
        reader.read([{"person_id": 1}], hour(5))


def test_reader_refreshes_key_types_set_by_the_table(store: OnlineStore) -> None:
    """A first push with another key type is read as such until the table sets the types."""
    other = make_spec("person2", ["person_id"], amount="float64")
    store.put(other, {"person_id": "int64"}, [row(7, 1.0)])
    reader = reader_of(store, other)
    with pytest.raises(InvalidRequest, match="must be a whole number"):
        reader.read([{"person_id": "a"}], hour(5))
    store.set_key_types("person2", {"person_id": "string"})
    assert reader.read([{"person_id": "a"}], hour(5)).columns["person2__amount"] == [None]
    store.put(other, {"person_id": "string"}, [row("a", 2.0)])
    assert reader.read([{"person_id": "a"}], hour(5)).columns["person2__amount"] == [2.0]


def test_null_and_missing_have_different_status(store: OnlineStore) -> None:
    """The source has a null for the amount. An unknown person, and their cohort, is missing."""
    assert read(store, {"person_id": 2})[1]["person__amount"] == "null"
    assert {"missing"} == set(read(store, {"person_id": 99})[1].values())


def test_ttl_is_applied_at_the_request(store: OnlineStore) -> None:
    """An age equal to the TTL is valid. An expired person has no cohort."""
    assert read(store, {"person_id": 1}, at=11)[1]["person__amount"] == "present"
    values, status = read(store, {"person_id": 1}, at=11.001)
    assert (values["person__amount"], status["person__amount"]) == (None, "expired")
    assert (values["cohort__rate"], status["cohort__rate"]) == (None, "missing")


@pytest.mark.parametrize("known", [row(1, 9.0, "old", event=6), row(1, 9.0, "old", event=2, available=6)])
def test_value_from_after_the_request_is_never_returned(store: OnlineStore, known: OnlineRow) -> None:
    """Neither a later event nor a value that became known later."""
    store.replace(PERSON, {"person_id": "int64"}, [known])
    values, status = read(store, {"person_id": 1}, at=5.999)
    assert (values["person__amount"], status["person__amount"]) == (None, "newer")
    assert read(store, {"person_id": 1}, at=6)[0]["person__amount"] == 9.0


def test_rows_keep_order_and_repetitions(store: OnlineStore) -> None:
    """The result has one item for each entity in the request, also for unknown ones."""
    asked = [{"person_id": one} for one in (2, 1, 99, 1)]
    assert FeatureReader(SERVICE, store).read(asked, hour(5)).columns["cohort__rate"] == [0.7, 0.5, None, 0.5]


@pytest.mark.parametrize(
    ("entity", "words"),
    [
        ({"persn_id": 1}, "lacks the key 'person_id'"),
        ({"person_id": "1"}, "must be a whole number"),
        ({"person_id": True}, "must be a whole number"),
        ({"person_id": 1, "age_band": 3}, "must be text"),
    ],
)
def test_missing_key_or_wrong_key_type_is_refused(
    store: OnlineStore, entity: dict[str, Any], words: str
) -> None:
    """Without the check, a wrong type would look like an unknown entity."""
    with pytest.raises(InvalidRequest, match=words):
        read(store, entity)


def test_materialisation_replaces_all_rows_of_its_view_only(store: OnlineStore) -> None:
    """An entity without a new row is removed. Other views do not change."""
    assert store.replace(PERSON, {"person_id": "int64"}, [row(2, 20.0, "old")]) == 1
    assert read(store, {"person_id": 1})[1]["person__amount"] == "missing"
    values, _ = read(store, {"person_id": 2})
    assert (values["person__amount"], values["cohort__rate"]) == (20.0, 0.7)


def test_view_with_a_common_name_prefix_is_not_changed(store: OnlineStore) -> None:
    """The rows of `person` and `person2` are separate."""
    other = make_spec("person2", ["person_id"], amount="float64")
    store.replace(other, {"person_id": "int64"}, [row(1, 5.0)])
    store.replace(PERSON, {"person_id": "int64"}, [])
    columns = reader_of(store, other).read([{"person_id": 1}], hour(2)).columns
    assert columns["person2__amount"] == [5.0]


def test_failed_materialisation_leaves_the_old_rows(store: OnlineStore) -> None:
    """After an error in the middle, the old rows are unchanged."""

    def failing() -> Iterator[OnlineRow]:
        yield row(1, 99.0, "old")
        raise OSError("bucket lost")

    with pytest.raises(OSError, match="bucket lost"):
        store.replace(PERSON, {"person_id": "int64"}, failing())
    assert read(store, {"person_id": 1})[0]["person__amount"] == 10.0


def test_empty_store_returns_missing(tmp_path: Path, keys: Keyring) -> None:
    """A replica may start before the first materialisation."""
    empty = open_online_store(SMALL, Layout(str(tmp_path / "new")), keys)
    assert {"missing"} == set(read(empty, {"person_id": 1})[1].values())
    empty.close()


AMOUNT = make_spec("person", ["person_id"], amount="float64")


def write_amount(folder: Path) -> None:
    """Materialise a row, in a process of its own."""
    writer = open_store(folder, Keyring(folder / "keyring.json", bytes(32)))
    writer.replace(AMOUNT, {"person_id": "int64"}, [row(1, 7.0, event=0)])
    writer.close()


def test_open_reader_sees_what_another_process_writes(tmp_path: Path, keys: Keyring) -> None:
    """A replica does not have to restart after a materialisation."""
    replica = open_online_store(SMALL, Layout(str(tmp_path)), keys)
    reader = reader_of(replica, AMOUNT)
    assert reader.read([{"person_id": 1}], START).columns["person__amount"] == [None]
    job = forks.context().Process(target=write_amount, args=(tmp_path,))
    job.start()
    job.join()
    assert reader.read([{"person_id": 1}], START).columns["person__amount"] == [7.0]
    replica.close()


def test_older_view_version_reads_its_features_by_name(store: OnlineStore) -> None:
    """A new first feature does not shift an older model's inputs. A removed or retyped feature is null."""
    newer = make_spec("person", ["person_id"], added="int64", age_band="string")
    store.replace(newer, {"person_id": "int64"}, [row(1, 77, "old")])
    values, _ = read(store, {"person_id": 1})
    assert tuple(values.values()) == (None, "old", 0.7)
    retyped = make_spec("person", ["person_id"], amount="string", age_band="string")
    store.replace(retyped, {"person_id": "int64"}, [row(1, "ten", "old")])
    assert read(store, {"person_id": 1})[0]["person__amount"] is None


def test_long_text_keys_are_distinct(store: OnlineStore) -> None:
    """LMDB keys have at most 511 bytes."""
    long = "x" * 600
    store.replace(COHORT, {"age_band": "string"}, [row(long + "1", 0.1), row(long + "2", 0.2)])
    assert read(store, {"person_id": 1, "age_band": long + "2"})[0]["cohort__rate"] == 0.2
    assert read(store, {"person_id": 1, "age_band": long})[1]["cohort__rate"] == "missing"


MIXED = make_spec(
    "person", ["name"], illness="string/sensitive", ward="string/public", street="string/personal"
)
PATIENT = {"name": "Alicia Keyes"}


@pytest.fixture
def clinic(store: OnlineStore) -> OnlineStore:
    """Return a store with one patient and a column of every class."""
    store.replace(
        MIXED, {"name": "string"}, [row("Alicia Keyes", "measles-of-alicia", "ward-seven", "street-nine")]
    )
    return store


def only(*names: str) -> ServiceSpec:
    fields = [field for field in MIXED.fields if field.name in names]
    return service_of(replace(MIXED, version="-".join(names), fields=fields))


def read_patient(store: OnlineStore, service: ServiceSpec) -> list[Any]:
    """Read the features of the patient."""
    return [column[0] for column in FeatureReader(service, store).read([PATIENT], hour(5)).columns.values()]


@on_lmdb
def test_stolen_file_reveals_only_public_values(clinic: OnlineStore, tmp_path: Path) -> None:
    """The values of other classes and all keys are encrypted or hashed."""
    clinic.put(MIXED, {"name": "string"}, [row("Alicia Cook", "measles", "ward-six", "street-nine")])
    content = b"".join(path.read_bytes() for path in (tmp_path / "online").iterdir())
    assert b"ward-seven" in content
    assert b"ward-six" in content
    for secret in (b"Alicia", b"measles", b"street-nine"):
        assert secret not in content


class Refusing(Keyring):
    """A key store that refuses the keys of one class."""

    def unwrap(self, name: str, wrapped: str) -> bytes:
        if name.endswith("/sensitive"):
            raise AccessDenied(name)
        return super().unwrap(name, wrapped)


def test_reader_without_one_class_reads_the_others(clinic: OnlineStore, tmp_path: Path) -> None:
    """A read of that class raises an error. Its values are not reported as missing."""
    clinic._keys = Refusing(tmp_path / "keyring.json", bytes(32))
    assert read_patient(clinic, only("ward", "street")) == ["ward-seven", "street-nine"]
    with pytest.raises(AccessDenied, match="online/person/sensitive"):
        read_patient(clinic, only("illness", "ward"))


@on_lmdb
def test_values_cannot_be_moved_or_altered(clinic: OnlineStore) -> None:
    """A value that was moved to another entity or time, or has a changed bit, is refused."""
    clinic.replace(MIXED, {"name": "string"}, [])
    clinic.put(MIXED, {"name": "string"}, [row(name, name, "w", name) for name in ("Alicia Keyes", "Bob")])
    engine = clinic.engine
    assert isinstance(engine, LmdbEngine)
    with engine.env.begin() as transaction:
        rows = {key: value for key, value in transaction.cursor() if key.startswith(b"person\x00")}
    (first, mine), (second, theirs) = rows.items()
    later = theirs[:7] + b"!" + theirs[8:]
    assert later != theirs
    for change in (
        {first: theirs, second: mine},
        {first: later, second: later},
        {first: mine[:-1] + bytes([mine[-1] ^ 1])},
    ):
        with engine.env.begin(write=True) as transaction:
            for key, value in (rows | change).items():
                transaction.put(key, value)
        with pytest.raises(ArtifactTampered):
            FeatureReader(only("street"), clinic).read([PATIENT, {"name": "Bob"}], hour(5))


def test_revoked_key_stops_reads_when_the_cache_expires(
    clinic: OnlineStore, keys: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new materialisation uses the newest key version."""
    monkeypatch.setattr(online_store, "CACHE_S", 0.0)
    assert read_patient(clinic, only("street")) == ["street-nine"]
    keys.rotate("online/person/personal")
    clinic.replace(MIXED, {"name": "string"}, [row("Alicia Keyes", "i", "w", "moved")])
    assert read_patient(clinic, only("street")) == ["moved"]
    keys.revoke("online/person/personal")
    with pytest.raises(KeyRevoked):
        read_patient(clinic, only("street"))
    assert read_patient(clinic, only("ward")) == ["w"]


def test_reader_with_cached_keys_survives_an_unavailable_key_store(
    clinic: OnlineStore, keys: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot read a new materialisation, because it does not have its keys."""
    monkeypatch.setattr(online_store, "CACHE_S", 0.0)
    monkeypatch.setattr(online_store, "RETRY_S", 0.0)
    assert read_patient(clinic, only("street")) == ["street-nine"]

    def away(*_: str) -> bytes:
        raise KeyStoreUnavailable("away")

    monkeypatch.setattr(keys, "unwrap", away)
    assert read_patient(clinic, only("street")) == ["street-nine"]
    with pytest.raises(KeyStoreUnavailable):
        read_patient(clinic, only("illness"))
    monkeypatch.setattr(online_store, "KEPT_S", 0.0)
    with pytest.raises(KeyStoreUnavailable):  # the keys are not used without end
        read_patient(clinic, only("street"))


def test_refused_key_is_not_used_in_a_later_outage(
    clinic: OnlineStore, keys: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key store may become unavailable right after it has refused the key."""
    monkeypatch.setattr(online_store, "CACHE_S", 0.0)
    assert read_patient(clinic, only("street")) == ["street-nine"]
    for error in (AccessDenied("no"), KeyStoreUnavailable("away")):

        def refuse(*_: str, error: Exception = error) -> bytes:
            raise error

        monkeypatch.setattr(keys, "unwrap", refuse)
        with pytest.raises(type(error)):
            read_patient(clinic, only("street"))
