"""Every dtype stays unchanged from a push to the online store, the table, a training set, and into a push again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
import pytest

from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.access import key_store
from feature_jobs.store import Aggregation, Default, FeatureService, FeatureView, Field
from feature_jobs.store.definitions.missing import fill_online
from feature_jobs.store.offline.row_hash import row_hash
from feature_jobs.store.offline.training_set import assemble, join_in_process
from feature_jobs.store.online.reader import FeatureReader
from feature_jobs.store.types.dtypes import DTYPES, to_arrow, to_json
from serve_apps.replica.http import answer
from tests.projects.online import reader_of
from tests.projects.push import INCOME, START, PushProject
from tests.projects.views import apply_service, make_view

VALUES: dict[str, tuple[str, Any]] = {
    "flag": ("bool", True),
    "small": ("int32", -(2**31)),
    "large": ("int64", 2**53 + 1),
    "half": ("float32", 0.5),
    "tenth": ("float64", 0.1),
    "text": ("string", "ü"),
    "since": ("timestamp", "2023-05-01T00:00:00.000001Z"),
    "born": ("date", "1970-01-02"),
    "price": ("decimal(20, 4)", "-1234567890123456.7890"),
    "blob": ("bytes", "AAH/"),
    "emb": ("list<float32, 4>", [0.1, -2.0, 3.5, 1e-30]),
    "scores": ("list<float64>", [0.1, 1e300]),
    "codes": ("list<int64>", [2**53 + 1, -1]),
    "flags": ("list<bool>", [True, False]),
    "tags": ("list<string>", ["a", ""]),
}


def typed_view(*names: str) -> FeatureView:
    """A view with a column of each dtype."""
    schema = [
        Field(name, VALUES[name][0], sensitivity="personal" if name == "emb" else "internal")  # type: ignore[arg-type]
        for name in names or VALUES
    ]
    return make_view(source=INCOME.source, schema=schema, ttl=timedelta(days=30))


def pushed(person: int, features: dict[str, Any], hour: float = 1) -> dict[str, Any]:
    at = (START + timedelta(hours=hour)).isoformat()
    return {"keys": {"person_id": person}, "features": features, "event_timestamp": at}


def read(project: PushProject, *people: int, hour: float = 10) -> dict[str, list[Any]]:
    """Read features as `features:read` does, and parse the response."""
    reader = reader_of(project.store, project.view.spec)
    vectors = reader.read([{"person_id": person} for person in people], START + timedelta(hours=hour))
    for name, values in vectors.columns.items():  # as the client in a notebook gives them
        assert to_arrow(values, reader.dtypes[name]).type == DTYPES[reader.dtypes[name]]
    columns = {name: to_json(values, reader.dtypes[name]) for name, values in vectors.columns.items()}
    content: dict[str, list[Any]] = orjson.loads(answer(columns).body)
    return {name.removeprefix("income__"): values for name, values in content.items()}


@pytest.mark.parametrize("names", [(), ("emb",), ("half", "emb", "born"), ("codes", "tags")])
def test_values_that_were_read_can_be_pushed_again(
    open_project: Callable[..., PushProject], names: tuple[str, ...]
) -> None:
    """Before and after the stream and a materialisation, for one and for many entities, with and without nulls."""
    project = open_project(typed_view(*names))
    sent = {name: VALUES[name][1] for name in names or VALUES}
    everyone = range(12)
    answered = project.push(*(pushed(person, sent) for person in everyone), key="a")
    assert answered == {"view": "income", "accepted": 12, "quarantined": []}
    first = read(project, *everyone)
    assert {name: values[0] for name, values in first.items()} == sent
    assert all(values == [values[0]] * 12 for values in first.values())
    again = {name: values[3] for name, values in first.items()}
    project.push(pushed(3, again, hour=2), pushed(4, dict.fromkeys(sent), hour=2), key="b")
    assert {name: values[0] for name, values in read(project, 3).items()} == sent
    stream = project.stream()
    while stream.step():
        pass
    before = read(project, *everyone)
    assert before["emb" if "emb" in sent else "tags"][4] is None
    project.materialise()
    assert read(project, *everyone) == before
    project.push(pushed(3, sent, hour=3), key="c")
    assert read(project, *everyone) == before


def test_training_set_has_the_pushed_values(open_project: Callable[..., PushProject]) -> None:
    """With the declared types, nulls for unknown entities, and the service's defaults."""
    view = typed_view()
    defaults = {
        "income__price": Default("7"),
        "income__emb": Default([0.0] * 4),
        "income__born": Default("2000-01-01"),
    }
    service = FeatureService("s", views=[view], missing={**defaults, "income__blob": Default("AA==")})
    project = open_project(view)
    spec = apply_service(project.ledger, service)
    project.push(pushed(1, {name: value for name, (_, value) in VALUES.items()}), key="a")
    project.stream().step()
    at = pa.array([START + timedelta(hours=5)] * 2, pa.timestamp("us", "UTC"))
    entities = pa.table({"person_id": [1, 9], "event_timestamp": at})
    table = assemble(spec, {"income": project.snapshot()}, entities, join_parts=join_in_process).table
    known, unknown = table.to_pylist()
    assert known["income__price"] == Decimal("-1234567890123456.7890")
    assert known["income__emb"] == np.array(VALUES["emb"][1], np.float32).tolist()
    assert (known["income__blob"], known["income__tags"]) == (b"\x00\x01\xff", ["a", ""])
    assert (unknown["income__price"], unknown["income__emb"]) == (Decimal("7.0000"), [0.0] * 4)
    assert (unknown["income__blob"], unknown["income__codes"]) == (b"\x00", None)
    reader = FeatureReader(spec, project.store)
    vectors = reader.read([{"person_id": 9}], START + timedelta(hours=5))
    filled_rows = fill_online(spec.missing, vectors.columns, vectors.status, service="s", needed=spec.columns)
    assert set(filled_rows) == {"income__price", "income__emb", "income__born", "income__blob"}
    served = {name: to_json(vectors.columns[name], spec.dtypes[name])[0] for name in filled_rows}
    assert served == {
        "income__price": "7.0000",
        "income__emb": [0.0] * 4,
        "income__born": "2000-01-01",
        "income__blob": "AA==",
    }
    frame = pl.DataFrame(pl.from_arrow(table)).to_arrow().cast(table.schema)
    assert row_hash(frame) == row_hash(table)


def test_lists_are_encrypted_with_the_key_of_their_column(open_project: Callable[..., PushProject]) -> None:
    """The key covers the elements, and the file has no plain statistics."""
    project = open_project(typed_view("tags", "emb"))
    project.push(pushed(1, {"tags": ["canary"], "emb": [0.5] * 4}), key="a")
    project.stream().step()
    [file] = project.snapshot().files
    uri = f"{project.target().uri}/{file.path}"
    keys = ProtectedFiles(key_store(project.access)).keys(uri).columns
    assert keys["tags"] == "features/income/internal"
    assert keys["emb"] == "features/income/personal"
    content = Path(uri).read_bytes()
    assert b"canary" not in content
    assert np.array([0.5] * 4, np.float32).tobytes() not in content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("emb", [0.1] * 3),
        ("emb", [0.1, 0.2, 0.3, None]),
        ("price", 1.5),
        ("since", 1682899200000001),
        ("born", "yesterday"),
        ("blob", "not base64"),
    ],
)
def test_row_with_an_invalid_value_goes_to_quarantine_alone(
    open_project: Callable[..., PushProject], name: str, value: Any
) -> None:
    """The reason names the column and its dtype. The other rows are accepted."""
    project = open_project(typed_view())
    answered = project.push(pushed(1, {name: value}), pushed(2, {}), key="a")
    assert answered["accepted"] == 1
    assert answered["quarantined"] == [{"row": 0, "reason": f"{name} is no {VALUES[name][0]}"}]


def test_windows_over_dates_are_the_same_online_and_offline(open_project: Callable[..., PushProject]) -> None:
    """For min, max, last, distinct and count over two hours."""
    view = make_view(
        source=INCOME.source,
        schema=[Field("payment", "string"), Field("day", "date"), Field("emb", "list<float32, 2>")],
        event_id="payment",
        aggregations=[
            Aggregation("day", function, windows=[timedelta(hours=2)])
            for function in ("min", "max", "last", "distinct", "count")
        ],
    )
    project = open_project(view)
    days = ["2023-01-05", "1969-12-31", None, "2023-01-05", "2024-02-29"]
    rows = [
        pushed(1, {"payment": f"p{n}", "day": day, "emb": [1.0, 2.0]}, hour=10 + n / 2)
        for n, day in enumerate(days)
    ]
    project.push(*rows, key="a")
    project.stream().step()
    project.materialise()
    reader = reader_of(project.store, project.view.spec)
    for hour in (10.5, 12.0, 13.9, 19.0):
        [offline] = project.trained(hour)
        vectors = reader.read([{"person_id": 0}, {"person_id": 1}], START + timedelta(hours=hour))
        online = {
            name: list(to_json(values, reader.dtypes[name])) for name, values in vectors.columns.items()
        }
        assert orjson.loads(orjson.dumps(offline)) == online
