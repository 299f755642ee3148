"""A real replica of a model with on-demand features."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster.errors import DefinitionError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import FeatureServiceApplied
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.settings import PlatformConfig, StorageConfig
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, OnDemandTransform
from feature_jobs.store.catalog.specifications import Definitions, apply, service_spec
from serve_apps.predictor.on_demand_inputs import on_demand_inputs
from tests.servers.replica import Replica, running_replica

INCOME = FeatureView(
    "income",
    entities=[Entity("person", join_keys=["person_id"])],
    source=FileSource("income.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64"), Field("price", "decimal(8, 2)"), Field("emb", "list<float32, 2>")],
)
PREDICT = "/v1/models/m:predict"
ENTITIES = [{"person_id": 1}, {"person_id": 2}]


def loan_terms(table: pa.Table) -> pa.Table:
    assert table.schema.field("income__price").type == pa.decimal128(8, 2)
    days = pc.days_between(pa.scalar(date(2026, 1, 1)), table["due"])
    return pa.table({"share": pc.divide(table["asked"], table["income__amount"]), "days": days})


TERMS = OnDemandTransform(
    "terms",
    inputs=[Field("asked", "float64"), Field("channel", "string"), Field("due", "date")],
    sources=[INCOME],
    schema=[Field("share", "float64"), Field("days", "int64")],
    transform=loan_terms,
)
CREDIT = FeatureService("credit", views=[INCOME], on_demand=[TERMS])


def applied(root: Path) -> Ledger:
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(root))))
    definitions = Definitions(module="m", views={"income": INCOME}, services={"credit": CREDIT})
    apply(definitions, ledger, actor="t")
    return ledger


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    root = tmp_path_factory.mktemp("replica")
    applied(root).close()
    names = ("income__amount", "terms__share", "terms__days")
    emb = InputSpec(name="income__emb", dtype="float", length=2)
    inputs = (*(InputSpec(name=name, dtype="double") for name in names), emb)
    signature = ModelSignature(
        task=Task.regression, inputs=inputs, label="y", service="credit", service_version=CREDIT.version
    )
    with running_replica(root, signature) as running:
        yield running


def test_on_demand_features_are_computed_and_logged_with_their_inputs(replica: Replica) -> None:
    """A view's feature that the client sends is used by the transform, too."""
    features = {"asked": [2, None], "channel": "web", "income__amount": [4.0, 4.0], "due": "2026-01-31"}
    features["income__emb"] = [[0.5, 1.5], None]
    status, content = replica.json(PREDICT, {"entities": ENTITIES, "features": features})
    assert status == 200, content
    assert content["features_status"] == {"terms__share": ["present", "null"]}
    assert [row["value"] for row in content["predictions"]] == pytest.approx([0.365, 0.34], abs=1e-6)
    logged = replica.log().filter(prediction_id=content["prediction_id"])
    assert logged["terms__share"].to_list() == [0.5, None]
    assert (logged["asked"].to_list(), logged["channel"].to_list()) == ([2, None], ["web", "web"])
    assert (logged["due"].to_list(), logged["terms__days"].to_list()) == (["2026-01-31"] * 2, [30, 30])
    assert logged["income__emb"].to_list() == [[0.5, 1.5], None]


def test_request_without_needed_inputs_is_refused(replica: Replica) -> None:
    """A request with the feature itself needs no inputs."""
    status, content = replica.json(PREDICT, {"entities": ENTITIES, "features": {"channel": "web"}})
    assert (status, "'asked' is missing" in content["error"]) == (400, True)
    inputs = {"asked": 1.0, "channel": "web", "due": 20484}
    status, content = replica.json(PREDICT, {"entities": ENTITIES, "features": inputs})
    assert (status, "'due' must be date" in content["error"]) == (400, True)
    status, content = replica.json(PREDICT, {"entities": ENTITIES, "features": {"asked": "much"}})
    assert (status, "must be a number" in content["error"]) == (400, True)
    made = {"terms__share": 0.5, "terms__days": 1}
    status, _ = replica.json(PREDICT, {"entities": ENTITIES, "features": made})
    assert status == 200


def test_replica_does_not_start_without_the_code_its_model_was_trained_with(tmp_path: Path) -> None:
    """The error names the module."""
    ledger = applied(tmp_path)
    definition = TERMS.definition()
    definition["transform"] = {"name": "no_such_module:terms", "sha256": ""}
    event = FeatureServiceApplied(
        service="credit", version="v", views={}, view_order=[], on_demand=[definition]
    )
    ledger.append(event, actor="t")
    with pytest.raises(DefinitionError, match="No module 'no_such_module'"):
        on_demand_inputs(service_spec(ledger, "credit", "v"))
    ledger.close()
