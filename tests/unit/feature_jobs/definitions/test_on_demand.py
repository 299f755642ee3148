"""On-demand transforms: the same function in training and in serving."""

from __future__ import annotations

import importlib
import linecache
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BreakingChange, DefinitionError, InvalidRequest, TrainingSetError
from cluster.ledger import Ledger
from cluster.ledger.events import ModelRegistered
from feature_jobs.store import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    OnDemandTransform,
    Sensitivity,
)
from feature_jobs.store.catalog.plan import make_plan, plan_lines, require_no_broken_models
from feature_jobs.store.catalog.protection import service_keys, training_set_protection
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import (
    ServiceSpec,
    apply,
    load_definitions,
    service_spec,
)
from feature_jobs.store.on_demand import append_on_demand, from_request, load_transform
from tests.projects.views import apply_service, make_view

INCOME = FeatureView(
    "income",
    entities=[Entity("person", join_keys=["person_id"])],
    source=FileSource("income.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64"), Field("since", "timestamp")],
    purposes=["credit"],
)
ASKED = Field("asked", "float64", sensitivity=Sensitivity.PERSONAL)


def loan_terms(table: pa.Table) -> pa.Table:
    share = pc.divide(table["asked"], table["income__amount"])
    return pa.table({"since": table["income__since"], "share": share})


TERMS = OnDemandTransform(
    "terms",
    inputs=[ASKED],
    sources=[INCOME],
    schema=[Field("share", "float64", sensitivity=Sensitivity.PERSONAL), Field("since", "timestamp")],
    transform=loan_terms,
)
CREDIT = FeatureService("credit", views=[INCOME], on_demand=[TERMS])


def rows(asked: list[Any], amount: list[Any]) -> pa.Table:
    """Return entity rows with the features of the views."""
    times = pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * len(asked), pa.timestamp("us", "UTC"))
    return pa.table(
        {"asked": asked, "income__amount": pa.array(amount, pa.float64()), "income__since": times}
    )


def test_training_set_has_on_demand_columns_after_the_views(ledger: Ledger) -> None:
    """Inputs come from the entity rows. A whole number is accepted for a declared float."""
    spec = apply_service(ledger, CREDIT)
    assert spec.columns == ["income__amount", "income__since", "terms__share", "terms__since"]
    assert ServiceSpec.from_dict(spec.to_dict()) == spec
    table = append_on_demand(spec, rows([1, 2], [4.0, None]))
    assert table["terms__share"].to_pylist() == [0.25, None]
    assert table["terms__since"] == table["income__since"]


NUMBER = st.none() | st.floats(-1e6, 1e6)


@pytest.fixture(scope="module")
def applied_spec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceSpec]:
    opened = Ledger(f"sqlite:///{tmp_path_factory.mktemp('ledger')}/ledger.db")
    yield apply_service(opened, CREDIT)
    opened.close()


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1))
def test_serving_equals_training(
    applied_spec: ServiceSpec, pairs: list[tuple[float | None, float | None]]
) -> None:
    """For the same values. Times are the microseconds of the online store."""
    asked, amount = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    trained = append_on_demand(applied_spec, rows(asked, amount))
    micros = [1704067200000000] * len(pairs)
    features = {"income__amount": amount, "income__since": micros}
    served = from_request(applied_spec, {"asked": asked}, features)
    assert repr(served["terms__share"]) == repr(trained["terms__share"].to_pylist())
    assert served["terms__since"] == micros


def test_missing_or_wrong_input_is_refused(ledger: Ledger) -> None:
    """In training and in serving; the error names the input."""
    spec = apply_service(ledger, CREDIT)
    with pytest.raises(TrainingSetError, match="lack 'asked'"):
        append_on_demand(spec, rows([1.0], [1.0]).drop_columns("asked"))
    with pytest.raises(TrainingSetError, match="'asked' should be double"):
        append_on_demand(spec, rows(["much"], [1.0]))
    features = {"income__amount": [1.0], "income__since": [0]}
    with pytest.raises(InvalidRequest, match="'asked' is missing"):
        from_request(spec, {}, features)
    with pytest.raises(InvalidRequest, match="'terms' cannot be computed"):
        from_request(spec, {"asked": ["much"]}, features)


def test_code_other_than_the_applied_one_is_refused(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed or missing code. A plan that changes what a model calls is refused earlier."""
    monkeypatch.syspath_prepend(tmp_path)
    text = Path(__file__).read_text()
    start, end = text.index("INCOME = "), text.index("def rows")
    head = (
        "import pyarrow as pa\nimport pyarrow.compute as pc\nfrom feature_jobs.store import Entity, FeatureService, "
        "FeatureView, Field, FileSource, OnDemandTransform, Sensitivity\n\n"
    )
    path = tmp_path / "lending.py"
    path.write_text(head + text[start:end])
    apply(load_definitions("lending"), ledger, actor="user:test")
    spec = service_spec(ledger, "credit")
    lineage = {"service": "credit", "service_version": spec.version}
    model = ModelRegistered(
        name="loan", version=1, family="t", task="b", manifest_hash="", files={}, lineage=lineage, metrics={}
    )
    ledger.append(model, actor="user:test")
    append_on_demand(spec, rows([1.0], [1.0]))
    path.write_text(path.read_text().replace("pc.divide(", "pc.multiply(", 1) + "\n")
    linecache.clearcache()
    importlib.reload(importlib.import_module("lending"))
    load_transform.cache_clear()
    with pytest.raises(DefinitionError, match="is not the applied code"):
        append_on_demand(spec, rows([1.0], [1.0]))
    plan = make_plan(load_definitions("lending"), read_recorded(ledger))
    assert "on-demand transform terms" in "\n".join(plan_lines(plan))
    with pytest.raises(BreakingChange, match=r"model 'loan' version 1.*code of lending:loan_terms"):
        require_no_broken_models(plan, allow_breaking=True)
    path.write_text(re.sub("def loan_terms.*", "", path.read_text(), flags=re.DOTALL))
    monkeypatch.delattr("lending.loan_terms")
    with pytest.raises(DefinitionError, match="has no 'loan_terms'"):
        append_on_demand(spec, rows([1.0], [1.0]))


def test_personal_inputs_and_features_use_the_keys_of_their_class(ledger: Ledger) -> None:
    """The keys serve the purposes that all views of the service allow."""
    keys = {info.name: info for info in service_keys(CREDIT, region="eu")}
    assert keys["training_sets/credit/personal"].purposes == ("credit",)
    protection = dict(training_set_protection(apply_service(ledger, CREDIT)).keys)
    assert protection["asked"] == protection["terms__share"] == "training_sets/credit/personal"
    assert protection["terms__since"] == "training_sets/credit/internal"


def test_service_without_on_demand_keeps_its_version() -> None:
    """A service with an on-demand transform has another version, which depends on the code."""
    assert FeatureService("credit", views=[INCOME]).version != CREDIT.version
    assert FeatureService("credit", views=[INCOME], on_demand=()).version == "7c3709dc139a"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FeatureService("a", views=[], on_demand=[TERMS]), "no view"),
        (
            lambda: FeatureService("a", views=[make_view("wealth")], on_demand=[TERMS]),
            "reads the view 'income'",
        ),
        (lambda: on_demand(inputs=[]), "needs inputs and a schema"),
        (lambda: on_demand(inputs=[ASKED, ASKED]), "names the field 'asked' twice"),
        (lambda: on_demand(inputs=[Field("event_timestamp", "int64")]), "reserved for the platform"),
    ],
)
def test_invalid_transform_is_refused(make: Any, words: str) -> None:
    """The definition itself raises the error."""
    with pytest.raises(DefinitionError, match=words):
        make()


def on_demand(**changes: Any) -> OnDemandTransform:
    parts: dict[str, Any] = {"inputs": [ASKED], "schema": [Field("x", "int64")], "transform": loan_terms}
    return OnDemandTransform("terms", **(parts | changes))
