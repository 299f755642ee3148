"""A real replica whose feature service declares what replaces missing and expired features."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.ledger import open_ledger
from cluster.records.reading import read_records
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.settings import OnlineConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout
from feature_jobs.store import (
    Default,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    Missing,
    OnDemandTransform,
    Sensitivity,
)
from feature_jobs.store.catalog.protection import view_keys
from feature_jobs.store.catalog.specifications import Definitions, apply, view_spec
from feature_jobs.store.online.reader import epoch_microseconds, open_online_store
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.skew.served import read_served
from tests.servers.replica import MODEL, Replica, running_replica

NOW = datetime(2024, 1, 10, tzinfo=UTC)
PERSON = Entity("person", join_keys=["person_id"])
SOURCE = FileSource("x.parquet", event_timestamp="at")
INCOME = FeatureView(
    "income",
    entities=[PERSON],
    source=SOURCE,
    schema=[Field("amount", "float64"), Field("region", "string"), Field("emb", "list<float32, 2>")],
    ttl=timedelta(days=5),
)
RENT = FeatureView(
    "rent",
    entities=[Entity("region", join_keys=["region"])],
    source=SOURCE,
    schema=[Field("mean", "float64")],
)
DEBT = FeatureView(
    "debt",
    entities=[PERSON],
    source=SOURCE,
    schema=[Field("total", "float64", sensitivity=Sensitivity.PERSONAL)],
    purposes=["test"],
)


def half(table: pa.Table) -> pa.Table:
    return pa.table(
        {"debt": [None if total is None else total / 2 for total in table["debt__total"].to_pylist()]}
    )


HALF = OnDemandTransform(
    "half",
    inputs=[Field("asked", "float64")],
    sources=[DEBT],
    schema=[Field("debt", "float64")],
    transform=half,
)
CREDIT = FeatureService(
    "credit",
    views=[INCOME, RENT, DEBT],
    on_demand=[HALF],
    missing={
        "income__amount": Default(-7),
        "income__region": Default("north"),
        "income__emb": Default([0.0, 1.0]),
        "rent": Missing.NULL,
        "debt": Missing.REFUSE,
    },
)
ROWS: dict[str, dict[Any, tuple[datetime, tuple[Any, ...]]]] = {
    "income": {
        1: (NOW - timedelta(days=1), (4.0, "south", [0.5, 2.0])),
        2: (NOW - timedelta(days=6), (5.0, "south", [0.5, 2.0])),
        3: (NOW - timedelta(days=1), (None, None, None)),
    },
    "rent": {"north": (NOW, (9.0,)), "south": (NOW, (8.0,))},
    "debt": dict.fromkeys((1, 2, 3, 4), (NOW, (2.0,))),
}
"""View to key to event time and values. Person 5 has no values, and person 4 has only a debt."""
INPUTS = (
    InputSpec(name="income__amount", dtype="double"),
    InputSpec(name="income__region", dtype="string", categories=("north", "south")),
    InputSpec(name="rent__mean", dtype="double"),
    InputSpec(name="half__debt", dtype="double"),
    InputSpec(name="income__emb", dtype="float", length=2),
)
PREDICT = "/v1/models/m:predict"


def put_online(places: Layout, keys: KeyAccess) -> None:
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=places.root)))
    store = open_online_store(OnlineConfig(map_size_gib=0.1), places, key_store(keys), readonly=False)
    for view in (INCOME, RENT, DEBT):
        for info in view_keys(view, region="local"):
            key_store(keys).ensure(info)
        kind = "string" if view is RENT else "int64"
        rows = [
            OnlineRow(
                keys=(key,),
                event_us=epoch_microseconds(at),
                created_us=epoch_microseconds(at),
                seq=number,
                values=values,
            )
            for number, (key, (at, values)) in enumerate(ROWS[view.name].items())
        ]
        store.replace(view_spec(ledger, view.name), {view.join_keys[0]: kind}, rows)
    store.close()
    ledger.close()


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    root: Path = tmp_path_factory.mktemp("replica")
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(root))))
    views = {view.name: view for view in CREDIT.views}
    apply(Definitions(module="m", views=views, services={"credit": CREDIT}), ledger, actor="t")
    ledger.close()
    signature = ModelSignature(
        task=Task.regression, inputs=INPUTS, label="y", service="credit", service_version=CREDIT.version
    )
    with running_replica(root, signature, before=put_online) as running:
        yield running


def ask(replica: Replica, *people: int, **features: Any) -> tuple[int, dict[str, Any]]:
    body = {
        "entities": [{"person_id": person} for person in people],
        "features": {"asked": 1.0} | features,
        "as_of": NOW.isoformat(),
    }
    return replica.json(PREDICT, body)


def records(replica: Replica, prediction_id: str) -> list[dict[str, Any]]:
    log = read_records(Path(replica.places.predictions(MODEL)), key_store(replica.keys))
    return [record for record in log if record["prediction_id"] == prediction_id]


def test_default_replaces_a_missing_value_and_is_reported(replica: Replica) -> None:
    """It replaces expired and missing values, but not a null, and never a join key.

    The log records the model's inputs and where nothing was read, and the skew check sees the same.
    """
    status, content = ask(replica, 1, 2, 3, 4)
    assert status == 200, content
    known = ["present", "expired", "null", "missing"]
    assert content["features_status"] == {
        "income__amount": known,
        "income__region": known,
        "income__emb": known,
        "rent__mean": ["present", "missing", "missing", "missing"],
    }
    defaults = {"income__amount": -7.0, "income__region": "north", "income__emb": [0.0, 1.0]}
    assert content["features_defaults"] == defaults
    [record] = records(replica, content["prediction_id"])
    assert record["features"]["income__amount"] == [4.0, -7.0, None, -7.0]
    assert record["features"]["income__region"] == ["south", "north", None, "north"]
    assert record["features"]["income__emb"] == [[0.5, 2.0], [0.0, 1.0], None, [0.0, 1.0]]
    assert record["features"]["rent__mean"] == [8.0, None, None, None]
    assert record["features"]["half__debt"] == [1.0] * 4
    assert record["defaulted"] == {name: [1, 3] for name in defaults}
    [group], *_ = read_served([record], since=None)
    assert group.features["income__amount"] == [4.0, None, None, None]
    assert group.features["income__region"] == ["south", None, None, None]
    defaulted, sent = (content["predictions"], ask(replica, 1, 2, 3, 4, income__amount=[4, -7, None, -7])[1])
    assert sent["predictions"] == defaulted


def test_refusal_names_the_missing_feature(replica: Replica) -> None:
    """400, because the client can send the feature, or the inputs that it is made of."""
    status, content = ask(replica, 1, 5)
    assert (status, content["code"]) == (400, 400)
    assert content["features_status"] == {"debt__total": ["present", "missing"]}
    for words in (
        "Feature 'total' of view 'debt' is missing for entities[1]",
        "'credit'",
        "Give 'debt__total'",
    ):
        assert words in content["error"]
    status, content = ask(replica, 1, 5, half__debt=[1.0, 2.0])
    assert (status, content["features_defaults"]["income__amount"]) == (200, -7.0)


def test_complete_features_report_no_defaults(replica: Replica) -> None:
    """The log reports no defaults, either."""
    status, content = ask(replica, 1)
    assert (status, content.keys() & {"features_status", "features_defaults"}) == (200, set())
    [record] = records(replica, content["prediction_id"])
    assert record["defaulted"] == {}


@pytest.mark.parametrize("purpose", ["ads", ""])
def test_token_for_another_purpose_gets_no_score_from_stored_features(replica: Replica, purpose: str) -> None:
    """The same holds for `features:read`. A request with all inputs reads nothing, so it needs no purpose."""
    token = mint_token(replica.places, subject="t", role=Role.service, purpose=purpose, ttl_s=900)
    body = {"entities": [{"person_id": 1, "region": "south"}], "features": {"asked": 1.0}}
    status, answer = replica.json(PREDICT, body, token=token)
    assert (status, "purpose-not-listed" in answer["error"]) == (403, True)
    assert replica.json("/v2/models/m/infer", {}, token=token)[0] == 400
    assert replica.json("/v2/models/m", token=token)[0] == 200
