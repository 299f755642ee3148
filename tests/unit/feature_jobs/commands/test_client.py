"""The client for notebooks gives the same results as the commands, under the same policies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster.errors import AccessDenied, ClusterNotRunning, InvalidRequest, TrainingSetError, ViewRetired
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import AccessDecided, FeatureViewStateChanged, TrainingSetBuilt
from cluster.security.keys.access import key_store
from cluster.security.tokens.issuer import ensure_issuer
from cluster.session import write_record
from cluster.settings import OnlineConfig, PlatformConfig, StorageConfig
from cluster.storage import layout, read_parquet
from feature_jobs.client import FeatureStore, Rows
from feature_jobs.materialize import newest_rows
from feature_jobs.store import FeatureService, Field, OnDemandTransform
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.manifest import read_manifest, require_reproducible
from feature_jobs.store.online.reader import open_online_store
from jobs.train.data import join_keys
from tests.projects.tables import TIME, commit_rows, feature_rows, pin, target_of
from tests.projects.views import apply_service, make_view
from tests.servers.key_broker import running_broker
from tests.servers.replica import listener, record

AT = datetime(2024, 1, 1, tzinfo=UTC)
INCOME = make_view(schema=[Field("amount", "float64"), Field("since", "timestamp")])
PEOPLE = pa.table({"person_id": [2, 1, 9], "event_timestamp": pa.array([AT] * 3, offline.TIMESTAMP)})


def half(table: pa.Table) -> pa.Table:
    return pa.table({"share": pc.divide(table["asked"], table["income__amount"])})


TERMS = OnDemandTransform(
    "terms",
    inputs=[Field("asked", "float64")],
    sources=[INCOME],
    schema=[Field("share", "float64")],
    transform=half,
)
SERVICES = [
    FeatureService("credit", views=[INCOME]),
    FeatureService("offers", views=[INCOME], on_demand=[TERMS]),
]
KEYS = ("features/income/internal", "online/income/internal", "training_sets/credit/internal")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose cluster is this process, with one view applied, ingested and materialised."""
    root = tmp_path_factory.mktemp("project")
    config = PlatformConfig(storage=StorageConfig(root=str(root)))
    places = layout(config.storage)
    ensure_issuer(places)
    with running_broker(*KEYS) as access, listener() as port:
        write_record(record(root, access.socket, port), config.storage)
        ledger = open_ledger(config)
        for service in SERVICES:
            apply_service(ledger, service)
        spec = view_spec(ledger, "income")
        ledger.close()
        columns = {"person_id": [1, 2], "amount": [4.0, 8.0], "since": pa.array([AT, None], TIME)}
        target = target_of(places.features("income"), spec, access)
        commit_rows(target, feature_rows([AT, AT], **columns))
        pinned = pin(target)
        online = open_online_store(OnlineConfig(map_size_gib=0.01), places, key_store(access), readonly=False)
        online.replace(spec, pinned.key_types, newest_rows(spec, pinned, AT))
        online.close()
        yield root


@pytest.fixture
def store(root: Path) -> Iterator[FeatureStore]:
    with FeatureStore.attach(storage_root=str(root)) as attached:
        yield attached


@pytest.fixture
def ledger(root: Path) -> Iterator[Ledger]:
    opened = open_ledger(PlatformConfig(storage=StorageConfig(root=str(root))))
    yield opened
    opened.close()


def test_training_set_comes_as_arrow_polars_or_pandas(store: FeatureStore, ledger: Ledger) -> None:
    """It accepts entity rows of each kind, keeps their order, and records an event for each set."""
    num_before = len(list(ledger.entries(TrainingSetBuilt)))
    polars = pl.DataFrame(pl.from_arrow(PEOPLE))
    sets = [store.training_set("credit", people) for people in (PEOPLE, polars, polars.to_pandas())]
    amounts = pa.array([8.0, 4.0, None])
    assert all(one.to_arrow()["income__amount"].combine_chunks() == amounts for one in sets)
    assert sets[0].to_polars()["income__amount"].to_list() == [8.0, 4.0, None]
    assert sets[0].to_pandas()["income__since"].notna().to_list() == [False, True, False]
    built = [entry.payload for entry in ledger.entries(TrainingSetBuilt)][num_before:]
    assert [one["row_hash"] for one in built] == [one.manifest["row_hash"] for one in sets]


def test_saved_training_set_has_rows_and_a_recorded_manifest(
    store: FeatureStore, ledger: Ledger, tmp_path: Path
) -> None:
    """`jobs.train` reads the same files from the command."""
    training_set = store.training_set("credit", PEOPLE)
    training_set.save(f"{tmp_path}/train.parquet")
    assert read_parquet(f"{tmp_path}/train.parquet").equals(training_set.to_arrow())
    manifest = read_manifest(f"{tmp_path}/train.manifest.json")
    require_reproducible(manifest, ledger)
    content = json.loads((tmp_path / "train.manifest.json").read_text())
    assert content["columns"][0]["name"] == "income__amount"
    assert content["join_keys"] == ["person_id"]
    # A manifest of an older release does not say; the service that the ledger has does.
    older = {name: value for name, value in content.items() if name != "join_keys"}
    assert join_keys(older, ledger) == join_keys(content, ledger) == ("person_id",)


def test_features_are_read_online_by_key(store: FeatureStore) -> None:
    """Results have the order of the entities, with a status for each value."""
    read = store.read("credit", [{"person_id": 1}, {"person_id": 9}], as_of="2024-01-02")
    assert read.to_arrow().to_pydict() == {
        "person_id": [1, 9],
        "income__amount": [4.0, None],
        "income__since": [AT, None],
    }
    assert read.status["income__amount"] == ["present", "missing"]
    before = store.read("credit", [{"person_id": 1}], as_of=datetime(2023, 1, 1, tzinfo=UTC))
    assert before.status["income__amount"] == ["newer"]
    with pytest.raises(InvalidRequest, match="person_id"):
        store.read("credit", [{"id": 1}])


def test_on_demand_features_are_equal_online_and_in_training(store: FeatureStore) -> None:
    """Without inputs, an online read leaves them out."""
    training_set = store.training_set("offers", PEOPLE.append_column("asked", pa.array([2.0, 2.0, 2.0])))
    entities = [{"person_id": key} for key in PEOPLE["person_id"].to_pylist()]
    read = store.read("offers", entities, as_of=AT, features={"asked": [2.0, 2.0, 2.0]})
    for table in (training_set.to_arrow(), read.to_arrow()):
        assert table["terms__share"].to_pylist() == [0.25, 0.5, None]
    assert "terms__share" not in store.read("offers", entities, as_of=AT).to_arrow().column_names


def test_denied_read_is_recorded(root: Path, ledger: Ledger) -> None:
    """A role without permission gets AccessDenied, and the ledger has the denial."""
    with FeatureStore.attach(storage_root=str(root), role="auditor") as store:
        with pytest.raises(AccessDenied, match="may not build training set"):
            store.training_set("credit", PEOPLE)
        with pytest.raises(AccessDenied, match="may not read online"):
            store.read("credit", [{"person_id": 1}])
    denied = [entry.payload for entry in ledger.entries(AccessDecided) if not entry.payload["allowed"]]
    assert [payload["action"] for payload in denied] == ["build_training_set", "read_online"]
    assert {payload["entrypoint"] for payload in denied} == {"feature_jobs.client"}


def test_invalid_entity_rows_retired_view_and_missing_cluster_are_refused(
    store: FeatureStore, ledger: Ledger, tmp_path: Path
) -> None:
    """Each has its own error."""
    for entities, words in (([{"person_id": 1}], "must be a table"), (PEOPLE.slice(0, 0), "is empty")):
        with pytest.raises(TrainingSetError, match=words):
            store.training_set("credit", entities)
    for state in ("retired", "active"):
        event = FeatureViewStateChanged(view="income", state=state, previous="", reason="old")
        ledger.append(event, actor="t")
        if state == "retired":
            with pytest.raises(ViewRetired):
                store.training_set("credit", PEOPLE)
    with pytest.raises(ClusterNotRunning):
        FeatureStore.attach(storage_root=f"{tmp_path}/nowhere")


def test_whole_numbers_keep_their_digits_in_pandas_beside_a_null() -> None:
    """All types survive the conversion to pandas and back."""
    large = 2**53 + 1
    at = datetime(1, 1, 1, 0, 0, 0, 5, tzinfo=UTC)
    table = pa.table(
        {
            "n": pa.array([large, None]),
            "small": pa.array([1, None], pa.int32()),
            "flag": pa.array([True, None]),
            "at": pa.array([at, None], offline.TIMESTAMP),
            "day": pa.array([date(9999, 12, 31), None]),
            "price": pa.array([Decimal("0.10"), None]),
            "blob": pa.array([b"a", None]),
            "emb": pa.array([[0.5], None], pa.list_(pa.float32())),
        }
    )
    frame = Rows(table=table).to_pandas()
    kinds = {"n": "Int64", "small": "Int32", "flag": "boolean", "at": "datetime64[us, UTC]"}
    assert {name: str(frame[name].dtype) for name in kinds} == kinds
    assert int(frame["n"][0]) == large
    assert pa.Table.from_pandas(frame, preserve_index=False).cast(table.schema).equals(table)
