"""Tests of definitions that change while their data stays.

They cover plan, apply, ingest, and the rows that each version reads.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import polars as pl
import pytest

from cluster.ledger.events import BatchIngested, FeatureViewApplied, ModelRegistered
from feature_jobs.store.catalog.specifications import service_spec

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, NotNull

order = FeatureView(
    "basket",
    entities=[Entity("shopper", join_keys=["shopper_id"])],
    source=FileSource("basket.parquet", event_timestamp="at"),
    schema=[FIELDS],
    owner="OWNER",
)
shopping = FeatureService("shopping", views=[order])
"""
TOTAL, ITEMS = 'Field("total", "float64")', 'Field("items", "int64")'
AT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def define(project: Project, *fields: str, owner: str = "") -> None:
    text = DEFINITIONS.replace("FIELDS", ", ".join(fields)).replace("OWNER", owner)
    (project.root / "baskets.py").write_text(text)


def write(project: Project, name: str, first: int) -> None:
    """Write ten shoppers with all columns."""
    ids = range(first, first + 10)
    frame = pl.DataFrame(
        {"shopper_id": ids, "total": [float(one) for one in ids], "items": ids, "at": [AT] * 10}
    )
    frame.write_parquet(project.root / name)


def run(project: Project, command: str, *arguments: str, refused: str | None = None) -> str:
    """Run a command and return its output.

    With `refused`, require that the command is refused with this text.
    """
    result = project.run(f"feature_jobs.{command}", "definitions=baskets", *arguments, check=refused is None)
    if refused is not None:
        assert (result.returncode, refused in result.stderr) == (2, True), result.stderr
    return result.stdout


def training_set(project: Project) -> pl.DataFrame:
    run(
        project, "training_set", "service=shopping", "entities=shoppers.parquet", "output=baskets_out.parquet"
    )
    return pl.read_parquet(project.root / "baskets_out.parquet")


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """Apply the first version, ingest ten shoppers, and register a model that uses this version."""
    define(falaj_cluster, TOTAL)
    write(falaj_cluster, "basket.parquet", 0)
    write(falaj_cluster, "more.parquet", 10)
    people = pl.DataFrame({"shopper_id": range(20), "event_timestamp": [AT] * 20})
    people.write_parquet(falaj_cluster.root / "shoppers.parquet")
    run(falaj_cluster, "apply")
    run(falaj_cluster, "ingest", "view=basket")
    service = service_spec(falaj_cluster.ledger(), "shopping")
    lineage = {"service": "shopping", "service_version": service.version}
    model = ModelRegistered(
        name="spender",
        version=1,
        family="t",
        task="binary",
        manifest_hash="",
        files={},
        lineage=lineage,
        metrics={},
    )
    falaj_cluster.ledger().append(model, actor="tester")
    return falaj_cluster


def test_dry_run_tells_and_changes_nothing(project: Project) -> None:
    """A dry run shows the changes and records none.

    A role that may not apply definitions may still run it.
    """
    define(project, TOTAL, ITEMS)
    before = len(list(project.ledger().entries(FeatureViewApplied)))
    said = run(project, "apply", "plan=true", "identity.role=auditor")
    assert "+ column items int64, internal" in said
    assert len(list(project.ledger().entries(FeatureViewApplied))) == before
    run(project, "apply", "identity.role=auditor", refused="may not apply definitions")


def test_change_that_breaks_a_model_is_refused(project: Project) -> None:
    """A change that breaks a model is refused, and records nothing.

    A dry run is refused too. A column whose new type cannot share the table is refused even with
    `allow_breaking=true`.
    """
    before = len(list(project.ledger().entries(FeatureViewApplied)))
    define(project, ITEMS)
    for dry in ("plan=true", "plan=false"):
        run(project, "apply", dry, refused="would break model 'spender' version 1")
    define(project, 'Field("total", "int64")')
    run(project, "apply", "allow_breaking=true", refused="would not stay readable")
    assert len(list(project.ledger().entries(FeatureViewApplied))) == before


def test_new_column_is_null_in_old_rows_until_their_file_is_ingested_again(project: Project) -> None:
    """A new column is null in old rows until their file is ingested again.

    No rows are rewritten when the column is added. The earlier version reads the same values as before, from
    old and new files.
    """
    define(project, TOTAL, ITEMS)
    run(project, "apply")
    run(project, "ingest", "view=basket", "source.path=more.parquet")
    mixed = training_set(project)
    assert mixed["basket__total"].to_list() == [float(one) for one in range(20)]
    assert mixed["basket__items"].to_list() == [None] * 10 + list(range(10, 20))
    run(project, "ingest", "view=basket")
    filled = training_set(project)
    assert filled["basket__items"].to_list() == list(range(20))
    define(project, TOTAL)
    run(project, "apply")
    assert training_set(project).columns == ["shopper_id", "event_timestamp", "basket__total"]
    assert training_set(project)["basket__total"].to_list() == [float(one) for one in range(20)]


def test_change_that_says_nothing_about_rows_ingests_nothing_twice(project: Project) -> None:
    """A new owner makes a new version of the view, but the same file is not ingested again."""
    define(project, TOTAL, owner="risk")
    run(project, "apply")
    before = len(list(project.ledger().entries(BatchIngested)))
    run(project, "ingest", "view=basket")
    define(project, TOTAL, owner="sales")
    run(project, "apply")
    assert "already" in run(project, "ingest", "view=basket")
    assert len(list(project.ledger().entries(BatchIngested))) <= before + 1


def test_view_is_deprecated_retired_and_taken_back(project: Project) -> None:
    """A deprecated view gives a warning.

    A retired view accepts no new rows and no new training sets; its stored rows can still be materialised.
    `restore=true` ends the retirement.
    """
    run(project, "apply")
    retire = ("feature_jobs.retire", "view=basket", "reason=use purses")
    denied = project.run(*retire, "identity.role=auditor")
    assert (denied.returncode, "may not apply definitions" in denied.stderr) == (2, True)
    project.run(*retire, "deprecate=true", check=True)
    warned = project.run("feature_jobs.ingest", "definitions=baskets", "view=basket", check=True)
    assert "View 'basket' is deprecated" in warned.stderr
    told = project.run(*retire, check=True)
    assert "model spender version 1 continues to read it" in told.stdout
    assert "is retired" in run(project, "apply", "plan=true")
    run(project, "ingest", "view=basket", refused="use purses")
    entities = ("service=shopping", "entities=shoppers.parquet", "output=baskets_out.parquet")
    run(project, "training_set", *entities, refused="No new training set is built")
    run(project, "materialize", "view=basket")
    project.run(*retire, "restore=true", check=True)
    assert training_set(project).height == 20
