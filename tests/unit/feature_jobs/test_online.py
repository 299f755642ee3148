"""The online store: what a request may see at its own time, and never half a materialisation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AccessDenied, ArtifactTampered, InvalidRequest
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo, KeyRevoked, KeyStoreUnavailable
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec, ViewSpec
from feature_jobs.store.online import store as online_store
from feature_jobs.store.online.lmdb_engine import LmdbEngine
from feature_jobs.store.online.reader import FeatureReader, microseconds, open_online
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.online.store import OnlineStore

START = datetime(2024, 1, 1, tzinfo=UTC)
SMALL = OnlineConfig(map_size_gib=0.01)
on_lmdb = pytest.mark.parametrize("store", ["lmdb"], indirect=True)


def view(name: str, keys: list[str], *, ttl_h: float | None = None, **fields: str) -> ViewSpec:
    """A view's spec from feature names and dtypes."""
    specs = [
        FieldSpec(name=field, dtype=dtype, sensitivity="internal", categorical=False)
        for field, dtype in fields.items()
    ]
    ttl_s = None if ttl_h is None else ttl_h * 3600
    return ViewSpec(name=name, version="v1", join_keys=keys, fields=specs, ttl_s=ttl_s)


PERSON = view("person", ["person_id"], ttl_h=10, amount="float64", age_band="string")
COHORT = view("cohort", ["age_band"], rate="float64")
SERVICE = ServiceSpec(name="credit", version="s1", views=[PERSON, COHORT])


def hour(number: float) -> datetime:
    """A moment after the start."""
    return START + timedelta(hours=number)


def row(key: int | str, *values: Any, event: float = 1, available: float | None = None) -> OnlineRow:
    """An entity's row, known when it happened unless said otherwise."""
    known = event if available is None else available
    return OnlineRow(
        keys=(key,),
        event_us=microseconds(hour(event)),
        created_us=microseconds(hour(known)),
        seq=0,
        values=values,
    )


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    keyring = Keyring.create(tmp_path / "keyring.json", bytes(32))
    for name in ("person", "cohort", "person2"):
        for sensitivity in ("internal", "personal", "sensitive"):
            keyring.ensure(KeyInfo(name=f"online/{name}/{sensitivity}"))
    return keyring


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, keys: Keyring) -> Iterator[OnlineStore]:
    config = SMALL
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        config = OnlineConfig(kind=OnlineKind.redis, url=url, prefix=tmp_path.name)
    opened = open_online(config, Layout(str(tmp_path)), keys, readonly=False)
    opened.replace(PERSON, {"person_id": "int64"}, [row(1, 10.0, "young"), row(2, None, "old")])
    opened.replace(COHORT, {"age_band": "string"}, [row("young", 0.5), row("old", 0.7)])
    yield opened
    opened.close()


def read(
    store: OnlineStore, entity: Mapping[str, Any], *, at: float = 5
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and status of one entity, by column."""
    vectors = FeatureReader(SERVICE, store).read([entity], hour(at))
    assert SERVICE.columns == list(vectors.columns) == list(vectors.status)
    values = {name: column[0] for name, column in vectors.columns.items()}
    return values, {name: str(column[0]) for name, column in vectors.status.items()}


def test_join_key_comes_from_an_earlier_view(store: OnlineStore) -> None:
    """As in the training set: the person's band is the key of the cohort."""
    values, status = read(store, {"person_id": 1})
    assert values == {"person__amount": 10.0, "person__age_band": "young", "cohort__rate": 0.5}
    assert {"present"} == set(status.values())


@pytest.mark.parametrize("others", [0, 64])
def test_list_of_an_earlier_length_is_read_as_it_is(store: OnlineStore, others: int) -> None:
    """As in the training set: neither cut nor filled up to the length that is declared now."""
    lists = view("person2", ["person_id"], emb="list<float32, 3>", amount="float64")
    given = [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], *([1.0, 2.0, 3.0] for _ in range(others))]
    rows = [row(number, emb, 1.5) for number, emb in enumerate(given)]
    store.replace(lists, {"person_id": "int64"}, rows)
    reader = FeatureReader(ServiceSpec(name="s", version="1", views=[lists]), store)
    found = reader.read([{"person_id": number} for number in range(len(given))], hour(5))
    assert [list(one) for one in found.columns["person2__emb"]] == given
    assert set(found.status["person2__emb"]) == {"present"}


def test_a_whole_number_stored_as_a_fraction_serves_as_a_key(store: OnlineStore) -> None:
    """As in the training set, where 10.0 is the key 10; 0.5 is none."""
    service = ServiceSpec(name="s", version="1", views=[PERSON, view("cohort", ["amount"], rate="float64")])
    store.replace(service.views[1], {"amount": "int64"}, [row(10, 0.9)])
    reader = FeatureReader(service, store)
    assert reader.read([{"person_id": 1}], hour(5)).columns["cohort__rate"] == [0.9]
    store.put(PERSON, {"person_id": "int64"}, [row(1, 0.5, "young", event=2)])
    with pytest.raises(InvalidRequest, match="amount must be a whole number"):
        reader.read([{"person_id": 1}], hour(5))


def test_a_reader_follows_the_types_of_keys_when_the_table_decides_them(store: OnlineStore) -> None:
    """A first push of another type holds it up no longer than until then."""
    other = view("person2", ["person_id"], amount="float64")
    store.put(other, {"person_id": "int64"}, [row(7, 1.0)])
    reader = FeatureReader(ServiceSpec(name="s", version="1", views=[other]), store)
    with pytest.raises(InvalidRequest, match="must be a whole number"):
        reader.read([{"person_id": "a"}], hour(5))
    store.set_key_types("person2", {"person_id": "string"})
    assert reader.read([{"person_id": "a"}], hour(5)).columns["person2__amount"] == [None]
    store.put(other, {"person_id": "string"}, [row("a", 2.0)])
    assert reader.read([{"person_id": "a"}], hour(5)).columns["person2__amount"] == [2.0]


def test_join_key_of_the_request_goes_before_that_of_a_view(store: OnlineStore) -> None:
    """What the request says counts."""
    assert read(store, {"person_id": 1, "age_band": "old"})[0]["cohort__rate"] == 0.7


def test_null_and_missing_are_told_apart(store: OnlineStore) -> None:
    """The source said nothing of the amount; nobody said anything of a stranger, or of a stranger's cohort."""
    assert read(store, {"person_id": 2})[1]["person__amount"] == "null"
    assert {"missing"} == set(read(store, {"person_id": 99})[1].values())


def test_ttl_is_measured_at_the_request(store: OnlineStore) -> None:
    """Age equal to the limit still counts; an expired person has no cohort."""
    assert read(store, {"person_id": 1}, at=11)[1]["person__amount"] == "present"
    values, status = read(store, {"person_id": 1}, at=11.001)
    assert (values["person__amount"], status["person__amount"]) == (None, "expired")
    assert (values["cohort__rate"], status["cohort__rate"]) == (None, "missing")


@pytest.mark.parametrize("known", [row(1, 9.0, "old", event=6), row(1, 9.0, "old", event=2, available=6)])
def test_value_from_after_the_request_is_never_given(store: OnlineStore, known: OnlineRow) -> None:
    """Neither one that happened later nor one that became known later."""
    store.replace(PERSON, {"person_id": "int64"}, [known])
    values, status = read(store, {"person_id": 1}, at=5.999)
    assert (values["person__amount"], status["person__amount"]) == (None, "newer")
    assert read(store, {"person_id": 1}, at=6)[0]["person__amount"] == 9.0


def test_rows_keep_order_and_repetitions(store: OnlineStore) -> None:
    """One item per entity asked, strangers between."""
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
def test_key_that_is_absent_or_of_another_type_is_refused(
    store: OnlineStore, entity: dict[str, Any], words: str
) -> None:
    """A wrong type would otherwise look like an unknown entity."""
    with pytest.raises(InvalidRequest, match=words):
        read(store, entity)


def test_materialisation_replaces_all_rows_of_its_view_only(store: OnlineStore) -> None:
    """An entity that is no longer known is gone; other views are as they were."""
    assert store.replace(PERSON, {"person_id": "int64"}, [row(2, 20.0, "old")]) == 1
    assert read(store, {"person_id": 1})[1]["person__amount"] == "missing"
    assert tuple(read(store, {"person_id": 2})[0][name] for name in ("person__amount", "cohort__rate")) == (
        20.0,
        0.7,
    )


def test_view_whose_name_begins_like_another_is_left_alone(store: OnlineStore) -> None:
    """`person` and `person2` share a beginning, not rows."""
    other = view("person2", ["person_id"], amount="float64")
    store.replace(other, {"person_id": "int64"}, [row(1, 5.0)])
    store.replace(PERSON, {"person_id": "int64"}, [])
    service = ServiceSpec(name="s", version="1", views=[other])
    assert FeatureReader(service, store).read([{"person_id": 1}], hour(2)).columns["person2__amount"] == [5.0]


def test_failed_materialisation_leaves_the_old_rows(store: OnlineStore) -> None:
    """An error halfway is as if it had not begun."""

    def failing() -> Iterator[OnlineRow]:
        yield row(1, 99.0, "old")
        raise OSError("bucket lost")

    with pytest.raises(OSError, match="bucket lost"):
        store.replace(PERSON, {"person_id": "int64"}, failing())
    assert read(store, {"person_id": 1})[0]["person__amount"] == 10.0


def test_store_without_any_materialisation_knows_nothing(tmp_path: Path, keys: Keyring) -> None:
    """A replica may start first."""
    empty = open_online(SMALL, Layout(str(tmp_path / "new")), keys)
    assert {"missing"} == set(read(empty, {"person_id": 1})[1].values())
    empty.close()


WRITER = """
import sys
from pathlib import Path
from cluster.security.keys.keyring import Keyring
from cluster.settings import OnlineConfig
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import FieldSpec, ViewSpec
from feature_jobs.store.online.reader import open_online
from feature_jobs.store.online.rows import OnlineRow
field = FieldSpec(name="amount", dtype="float64", sensitivity="internal", categorical=False)
view = ViewSpec(name="person", version="v1", join_keys=["person_id"], fields=[field], ttl_s=None)
keys = Keyring(Path(sys.argv[1]) / "keyring.json", bytes(32))
store = open_online(OnlineConfig(map_size_gib=0.01), Layout(sys.argv[1]), keys, readonly=False)
row = OnlineRow(keys=(1,), event_us=0, created_us=0, seq=0, values=[7.0])
store.replace(view, {"person_id": "int64"}, [row])
"""


def test_open_reader_sees_what_another_process_writes(tmp_path: Path, keys: Keyring) -> None:
    """A replica is not restarted for a materialisation."""
    service = ServiceSpec(name="s", version="1", views=[view("person", ["person_id"], amount="float64")])
    replica = open_online(SMALL, Layout(str(tmp_path)), keys)
    reader = FeatureReader(service, replica)
    assert reader.read([{"person_id": 1}], START).columns["person__amount"] == [None]
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], check=True)
    assert reader.read([{"person_id": 1}], START).columns["person__amount"] == [7.0]
    replica.close()


def test_replica_of_an_older_view_version_finds_its_features_by_name(store: OnlineStore) -> None:
    """A view that grew in front must not shift an older model's inputs; a feature it no longer has is null."""
    newer = view("person", ["person_id"], added="int64", age_band="string")
    store.replace(newer, {"person_id": "int64"}, [row(1, 77, "old")])
    values, _ = read(store, {"person_id": 1})
    assert tuple(values.values()) == (None, "old", 0.7)


def test_feature_with_another_dtype_is_not_given_to_an_older_version(store: OnlineStore) -> None:
    """A number where the model learned a text would be refused or, worse, taken."""
    newer = view("person", ["person_id"], amount="string", age_band="string")
    store.replace(newer, {"person_id": "int64"}, [row(1, "ten", "old")])
    assert read(store, {"person_id": 1})[0]["person__amount"] is None


def test_long_text_keys_are_told_apart(store: OnlineStore) -> None:
    """LMDB takes keys of 511 bytes at most."""
    long = "x" * 600
    store.replace(COHORT, {"age_band": "string"}, [row(long + "1", 0.1), row(long + "2", 0.2)])
    assert read(store, {"person_id": 1, "age_band": long + "2"})[0]["cohort__rate"] == 0.2
    assert read(store, {"person_id": 1, "age_band": long})[1]["cohort__rate"] == "missing"


MIXED = ViewSpec(
    name="person",
    version="v1",
    join_keys=["name"],
    fields=[
        FieldSpec(name=name, dtype="string", sensitivity=sensitivity, categorical=False)
        for name, sensitivity in (("illness", "sensitive"), ("ward", "public"), ("street", "personal"))
    ],
    ttl_s=None,
)
PATIENT = {"name": "Alicia Keyes"}


@pytest.fixture
def clinic(store: OnlineStore) -> OnlineStore:
    """One patient, with a column of every class."""
    store.replace(
        MIXED, {"name": "string"}, [row("Alicia Keyes", "measles-of-alicia", "ward-seven", "street-nine")]
    )
    return store


def only(*names: str) -> ServiceSpec:
    fields = [field for field in MIXED.fields if field.name in names]
    view = ViewSpec(name="person", version="-".join(names), join_keys=["name"], fields=fields, ttl_s=None)
    return ServiceSpec(name="s", version="1", views=[view])


def ask(store: OnlineStore, service: ServiceSpec) -> list[Any]:
    return [column[0] for column in FeatureReader(service, store).read([PATIENT], hour(5)).columns.values()]


@on_lmdb
def test_a_stolen_file_shows_public_values_and_nobodys_name(clinic: OnlineStore, tmp_path: Path) -> None:
    """Neither values nor keys of any other class."""
    clinic.put(MIXED, {"name": "string"}, [row("Alicia Cook", "measles", "ward-six", "street-nine")])
    content = b"".join(path.read_bytes() for path in (tmp_path / "online").iterdir())
    assert b"ward-seven" in content
    assert b"ward-six" in content
    for secret in (b"Alicia", b"measles", b"street-nine"):
        assert secret not in content


class Refusing(Keyring):
    """Gives no secrets of one class."""

    def unwrap(self, name: str, wrapped: str) -> bytes:
        if name.endswith("/sensitive"):
            raise AccessDenied(name)
        return super().unwrap(name, wrapped)


def test_who_may_not_read_one_class_reads_the_others(clinic: OnlineStore, tmp_path: Path) -> None:
    """Asked for a feature of that class he is refused, not told that it is missing."""
    clinic._keys = Refusing(tmp_path / "keyring.json", bytes(32))
    assert ask(clinic, only("ward", "street")) == ["ward-seven", "street-nine"]
    with pytest.raises(AccessDenied, match="online/person/sensitive"):
        ask(clinic, only("illness", "ward"))


@on_lmdb
def test_values_cannot_be_moved_or_altered(clinic: OnlineStore) -> None:
    """To another entity, or to another time, or bit by bit."""
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


def test_a_revoked_key_ends_reading_within_the_caches_life(
    clinic: OnlineStore, keys: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a new materialisation is under the newest version."""
    monkeypatch.setattr(online_store, "CACHE_S", 0.0)
    assert ask(clinic, only("street")) == ["street-nine"]
    keys.rotate("online/person/personal")
    clinic.replace(MIXED, {"name": "string"}, [row("Alicia Keyes", "i", "w", "moved")])
    assert ask(clinic, only("street")) == ["moved"]
    keys.revoke("online/person/personal")
    with pytest.raises(KeyRevoked):
        ask(clinic, only("street"))
    assert ask(clinic, only("ward")) == ["w"]


def test_a_key_store_that_is_away_stops_no_reader_that_has_its_keys(
    clinic: OnlineStore, keys: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of a materialisation whose keys it never had it cannot read."""
    monkeypatch.setattr(online_store, "CACHE_S", 0.0)
    assert ask(clinic, only("street")) == ["street-nine"]

    def away(name: str, wrapped: str) -> bytes:
        raise KeyStoreUnavailable("away")

    monkeypatch.setattr(keys, "unwrap", away)
    assert ask(clinic, only("street")) == ["street-nine"]
    with pytest.raises(KeyStoreUnavailable):
        ask(clinic, only("illness"))
