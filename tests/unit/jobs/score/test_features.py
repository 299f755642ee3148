"""Batch scoring of entity rows: features by a point-in-time join, or as of one time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cluster.errors import AccessDenied, RefusedError
from cluster.ledger.events import ScoringStarted
from cluster.registry import Lineage, ModelVersion
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.roles import Role
from feature_jobs.store import FeatureService, Field, Missing, OnDemandTransform, Sensitivity
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.definitions.missing import Default
from jobs.score.config import InputsFrom
from jobs.score.inputs import needed_service
from tests.projects.batch_scoring import ScoringProject
from tests.projects.features import INCOME, PEOPLE, START, FeatureProject
from tests.projects.views import apply_service, make_spec, make_view, service_of
from tests.servers.replica import write_model

AMOUNT = "income__amount"
HOURS = (0, 3, 5)
"""The amount of each person changes at these hours."""


@pytest.fixture
def store(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    """A feature store with three amounts for each person."""
    store = FeatureProject(tmp_path / ".falaj", access)
    for hour in HOURS:
        store.ingest(hour)
    yield store
    store.close()


@pytest.fixture
def project(store: FeatureProject, tmp_path: Path, access: KeyAccess) -> Iterator[ScoringProject]:
    """The same project for batch scoring."""
    project = ScoringProject(tmp_path, access)
    yield project
    project.close()


def register(project: ScoringProject, store: FeatureProject, *inputs: str) -> ModelVersion:
    """Register a model whose value is the sum of its inputs, divided by 100."""
    spec = service_spec(store.ledger, "credit").version
    signature = ModelSignature(
        task=Task.regression,
        inputs=tuple(InputSpec(name=name, dtype="double") for name in inputs or (AMOUNT,)),
        label="y",
        service="credit",
        service_version=spec,
    )
    lineage = Lineage(service="credit", service_version=spec)
    return project.register(signature, write=write_model, lineage=lineage)


def ratio(table: pa.Table) -> pa.Table:
    """Divide whole numbers. For a row with an amount of 0, Arrow raises an error."""
    amount = table["income__amount"].cast(pa.int64())
    return pa.table({"ratio": pc.divide(table["asked"], amount).cast(pa.float64())})


TERMS = OnDemandTransform(
    "terms",
    inputs=[Field("asked", "int64")],
    sources=[INCOME],
    schema=[Field("ratio", "float64")],
    transform=ratio,
)


def entities(*hours: float | None) -> pa.Table:
    """Return one row for each person and hour; None is a row without a time."""
    times = [
        None if hour is None else START + dt.timedelta(hours=hour) for hour in hours for _ in range(PEOPLE)
    ]
    people = [person for _ in hours for person in range(PEOPLE)]
    return pa.table({"person_id": people, "event_timestamp": pa.array(times, pa.timestamp("us", "UTC"))})


def known(hour: float) -> int:
    """Return the hour of the newest amount that is known at an hour."""
    return max(one for one in HOURS if one <= hour)


def values(project: ScoringProject, output: str = "scores") -> list[float]:
    scores = project.scores(output).sort("input_row")
    return [round(value * 100, 3) for value in scores["value"].to_list()]


def test_each_row_gets_the_values_of_its_own_time(project: ScoringProject, store: FeatureProject) -> None:
    """In parts of several sizes. The scores are those of the rows of a training set."""
    register(project, store)
    hours = (0.5, 3, 4.9, 100)
    project.write(entities(*hours))
    for part_rows in (7, 1000):
        project.score(part_rows=part_rows, output=f"{part_rows}")
        expected = [float(known(hour) * PEOPLE + person) for hour in hours for person in range(PEOPLE)]
        assert values(project, f"{part_rows}") == expected
    built = store.build(entities=str(project.root / "rows.parquet"), output="train")
    assert built["rows"] == len(expected)
    table = pq.read_table(project.root / "train.parquet")
    assert table[AMOUNT].to_pylist() == expected
    project.write(table, "given.parquet")
    project.score(input=str(project.root / "given.parquet"), output="given")
    assert values(project, "given") == expected


def test_as_of_now_reads_the_newest_values(project: ScoringProject, store: FeatureProject) -> None:
    """Or those of another time. The rows need no time."""
    register(project, store)
    project.write({"person_id": list(range(PEOPLE))})
    project.score(inputs_from=InputsFrom.latest)
    assert values(project) == [float(5 * PEOPLE + person) for person in range(PEOPLE)]
    project.score(
        inputs_from=InputsFrom.latest, as_of=(START + dt.timedelta(hours=4)).isoformat(), output="earlier"
    )
    assert values(project, "earlier") == [float(3 * PEOPLE + person) for person in range(PEOPLE)]
    assert project.scores("earlier")["as_of"].unique().to_list() == [START + dt.timedelta(hours=4)]
    with pytest.raises(RefusedError, match=r"no column 'event_timestamp'.*inputs_from=latest"):
        project.score(output="join")


def test_a_continued_run_reads_the_same_versions(
    project: ScoringProject, store: FeatureProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are ingested between a kill and the second start do not change the scores, in any part."""
    register(project, store)
    project.write({"person_id": list(range(PEOPLE))}, row_group_size=5)
    options: dict[str, Any] = {"inputs_from": InputsFrom.latest, "part_rows": 5}

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.score.part.write_result", killed)
        with pytest.raises(KeyboardInterrupt):
            project.score(**options)
    store.ingest(7)
    project.score(**options)
    assert values(project) == [float(5 * PEOPLE + person) for person in range(PEOPLE)]
    project.score(**options, output="new")
    assert values(project, "new") == [float(7 * PEOPLE + person) for person in range(PEOPLE)]
    first, second = (entry.payload["table_versions"] for entry in project.ledger.entries(ScoringStarted))
    assert first["income"] < second["income"]


def test_rows_without_key_time_or_required_feature_are_set_aside(
    project: ScoringProject, store: FeatureProject
) -> None:
    """The reason names the column. A feature that the service requires is missing for an unknown person."""
    view = make_view(schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)])
    apply_service(store.ledger, FeatureService("credit", views=[view], missing={"income": Missing.REFUSE}))
    register(project, store)
    table = pa.concat_tables(
        [
            entities(4),
            entities(None).slice(0, 3),
            pa.table({"person_id": [None, 999], "event_timestamp": [START, START]}).cast(entities(1).schema),
        ]
    )
    project.write(table)
    finished = project.score(max_bad_share=0.5, part_rows=8)
    assert finished.set_aside == {
        "'event_timestamp' is missing": 3,
        "'person_id' is missing": 1,
        "feature 'income__amount' is missing or expired, and required": 1,
    }
    assert finished.scored == PEOPLE


def test_a_default_replaces_a_missing_feature(project: ScoringProject, store: FeatureProject) -> None:
    """As in serving and in training sets."""
    view = make_view(schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)])
    apply_service(store.ledger, FeatureService("credit", views=[view], missing={AMOUNT: Default(7.0)}))
    register(project, store)
    project.write({"person_id": [3, 999]})
    project.score(inputs_from=InputsFrom.latest)
    assert values(project) == [5.0 * PEOPLE + 3, 7.0]


def test_on_demand_features_are_computed(project: ScoringProject, store: FeatureProject) -> None:
    """From inputs of the rows, as from a request's. A row for which the transform fails is set aside."""
    apply_service(store.ledger, FeatureService("credit", views=[INCOME], on_demand=[TERMS]))
    register(project, store, "terms__ratio")
    store.ingest(9, amount=pa.array([float(person % 5) for person in range(PEOPLE)]))
    project.write({"person_id": list(range(PEOPLE)), "asked": [60] * PEOPLE})
    finished = project.score(inputs_from=InputsFrom.latest, max_bad_share=0.5)
    assert finished.set_aside == {"an on-demand transform failed": 4}
    assert values(project) == [60 // (person % 5) for person in range(PEOPLE) if person % 5]
    project.write({"person_id": list(range(PEOPLE))})
    with pytest.raises(RefusedError, match="no column 'asked', which inputs_from=latest needs"):
        project.score(inputs_from=InputsFrom.latest, output="refused")


def test_only_the_views_that_the_model_needs_are_read(project: ScoringProject, store: FeatureProject) -> None:
    """Another view of the service has no rows, and the caller may not read it. A view that has a needed join key is
    read."""
    other = make_view("home", schema=[Field("size", "float64")])
    apply_service(store.ledger, FeatureService("credit", views=[INCOME, other]))
    register(project, store)
    project.write(entities(4))
    assert project.score().scored == PEOPLE
    person = make_spec("person", ["person_id"], home_id="int64")
    home, income = (
        make_spec("home", ["home_id"], size="float64"),
        make_spec("income", ["person_id"], amount="float64"),
    )
    spec = service_of(person, home, income)
    for wanted, columns, views in (
        ("home__size", {"person_id"}, ["person", "home"]),
        ("home__size", {"home_id"}, ["home"]),
        ("income__amount", {"person_id"}, ["income"]),
    ):
        assert [view.name for view in needed_service(spec, [wanted], columns).views] == views


def test_csv_rows_are_joined(project: ScoringProject, store: FeatureProject) -> None:
    """Keys and times are parsed. A key that is no whole number is set aside."""
    register(project, store)
    frame = pl.DataFrame(pl.from_arrow(entities(4)))
    (project.root / "rows.csv").write_text(frame.write_csv().replace("\n11,", "\nno key,"))
    finished = project.score(input=str(project.root / "rows.csv"))
    assert finished.set_aside == {"'person_id' is not int64": 1}
    assert values(project) == [float(3 * PEOPLE + person) for person in range(PEOPLE) if person != 11]


def test_a_stored_training_set_is_scored(project: ScoringProject, store: FeatureProject) -> None:
    """It is read with its keys. Any other file below the storage root is refused."""
    register(project, store)
    store.build(".falaj/jobs/train")
    path = project.root / ".falaj/jobs/train.parquet"
    project.score(input=str(path), output=".falaj/jobs/scores")
    assert values(project, ".falaj/jobs/scores") == [float(5 * PEOPLE + person) for person in range(PEOPLE)]
    for name in ("features/income", "jobs/other.parquet"):
        pq.write_table(entities(1), project.root / ".falaj/jobs/other.parquet")
        with pytest.raises(RefusedError, match="below the storage root and is not a training set"):
            project.score(input=str(project.root / ".falaj" / name), output=".falaj/jobs/refused")


def test_only_columns_that_the_caller_may_read_leave_the_storage_root(
    project: ScoringProject, store: FeatureProject
) -> None:
    """A data scientist for the view's purpose gets the inputs. Other roles and purposes get neither features nor
    scores."""
    view = make_view(
        schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)], purposes=("credit",)
    )
    apply_service(store.ledger, FeatureService("credit", views=[view]))
    register(project, store)
    project.write(entities(4))
    allowed = project.actor(Role.data_scientist, "credit")
    project.score(actor=allowed, keep_inputs=True)
    assert AMOUNT in project.scores().columns
    for role, purpose in (
        (Role.data_scientist, "marketing"),
        (Role.ml_engineer, "credit"),
        (Role.data_engineer, "credit"),
    ):
        for output in ("denied", ".falaj/jobs/denied"):
            with pytest.raises(AccessDenied):
                project.score(actor=project.actor(role, purpose), output=output)
            assert not (project.root / output).exists()


def test_given_rows_need_no_right_to_features(project: ScoringProject, store: FeatureProject) -> None:
    """An ML engineer scores rows that have the inputs, as with a request. A service may not write scores elsewhere."""
    register(project, store)
    project.write({"person_id": [1], AMOUNT: [50.0]})
    engineer = project.actor(Role.ml_engineer)
    project.score(actor=engineer)
    project.score(actor=engineer, output=".falaj/jobs/scores")
    assert values(project) == values(project, ".falaj/jobs/scores") == [50.0]
    with pytest.raises(AccessDenied, match="unwrap key on key 'scores/m/personal'"):
        project.score(actor=project.actor(Role.service), output="service")
