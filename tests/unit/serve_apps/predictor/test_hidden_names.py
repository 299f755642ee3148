"""An answer to an unknown name does not list the known names to a client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.registry import Registry
from cluster.runtime import InputSpec
from cluster.storage import Layout
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource
from feature_jobs.store.catalog.specifications import Definitions, apply, service_spec
from feature_jobs.store.ingestion.pushed_rows import check_rows
from feature_jobs.store.streaming.pushed_view import load_pushed_view
from serve_apps.predictor.request import override
from serve_apps.replica.http import refusal
from tests.projects.push import INCOME, START

SECRET = FeatureView(
    "layoffs",
    entities=[Entity("person", join_keys=["person_id"])],
    source=FileSource("x.parquet", event_timestamp="at"),
    schema=[Field("when", "string")],
)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger with a view and a service that the client does not know."""
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    services = {"plans": FeatureService("plans", views=[SECRET])}
    apply(Definitions(module="m", views={"layoffs": SECRET}, services=services), opened, actor="test")
    yield opened
    opened.engine.dispose()


def refusal_of(ask: Callable[[], object]) -> tuple[int, str, str]:
    """Return the answer's status and text, and the message that an operator reads."""
    with pytest.raises(FalajError) as refused:
        ask()
    response = refusal(refused.value)
    return response.status_code, orjson.loads(response.body)["error"], str(refused.value)


def test_unknown_views_services_and_models_list_nothing_to_a_client(ledger: Ledger, tmp_path: Path) -> None:
    """The answer does not contain even the nearest name. An operator who runs a command gets the list."""
    registry = Registry(ledger, Layout(str(tmp_path)))
    for ask, name in (
        (lambda: load_pushed_view(ledger, "layoff"), "layoffs"),
        (lambda: service_spec(ledger, "plan"), "plans"),
        (lambda: registry.get("plan"), None),
    ):
        status, client, person = refusal_of(ask)
        assert (status, client.endswith(".")) == (404, True)
        assert name is None or (name not in client and name in person)


def test_unknown_inputs_get_only_the_nearest_name() -> None:
    """A caller who may use the model or the view made a typing mistake; the whole list is never sent."""
    inputs = {name: InputSpec(name=name, dtype="double") for name in ("income__amount", "age", "secret")}
    status, client, _ = refusal_of(lambda: override(inputs, "income__amont", 1.0, 1))
    assert (status, "'income__amount'" in client, "secret" in client) == (400, True, False)
    row: dict[str, Any] = {
        "keys": {"person_id": 1},
        "features": {"amont": 1},
        "event_timestamp": START.isoformat(),
    }
    status, client, _ = refusal_of(lambda: check_rows([row], INCOME, key_types={}, now=START))
    assert (status, "'amount'" in client, "sector" in client) == (400, True, False)
