"""Definitions are recorded from a module, and specifications are read from the ledger without the module."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest

from cluster.errors import DefinitionError, FeatureServiceNotFound, FeatureViewNotFound
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied
from feature_jobs.store.catalog.specifications import (
    ServiceSpec,
    apply,
    load_definitions,
    service_spec,
    view_spec,
)

MODULE = """
from datetime import timedelta
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource

person = Entity("person", join_keys=["person_id"])
source = FileSource("income.parquet", event_timestamp="at")
income = FeatureView(
    "income", entities=[person], source=source, ttl=timedelta(days={days}),
    schema=[Field("amount", "float64"), Field("sector", "string", categorical=True)],
)
credit = FeatureService("credit", views=[income])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with users' modules, on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(folder: Path, name: str, *, text: str = MODULE, days: int = 365) -> str:
    """Write a module of definitions and return its name."""
    (folder / f"{name}.py").write_text(dedent(text).replace("{days}", str(days)))
    return name


def test_apply_twice_records_once(folder: Path, ledger: Ledger) -> None:
    """Applying the same definitions again records no event."""
    definitions = load_definitions(write(folder, "defs_once"))
    first = apply(definitions, ledger, actor="user:test")
    second = apply(definitions, ledger, actor="user:test")
    assert (list(first.views), list(first.services)) == (["income"], ["credit"])
    assert (second.views, second.services) == ({}, {})
    assert ledger.head() == 2


def test_changed_view_is_a_new_version_of_view_and_service(folder: Path, ledger: Ledger) -> None:
    """The old version stays readable, so a model that was trained with it keeps its features."""
    apply(load_definitions(write(folder, "defs_old")), ledger, actor="user:test")
    before = service_spec(ledger, "credit")
    apply(load_definitions(write(folder, "defs_new", days=30)), ledger, actor="user:test")
    after = service_spec(ledger, "credit")
    assert (before.views[0].ttl_s, after.views[0].ttl_s) == (365 * 86400, 30 * 86400)
    assert before == service_spec(ledger, "credit", before.version)


def test_going_back_to_an_old_definition_makes_it_the_newest(folder: Path, ledger: Ledger) -> None:
    """The newest version is the one that was applied last."""
    old, new = (load_definitions(write(folder, f"defs_{days}", days=days)) for days in (10, 20))
    for definitions in (old, new, old):
        apply(definitions, ledger, actor="user:test")
    assert old.views["income"].version == view_spec(ledger, "income").version
    assert old.services["credit"].version == service_spec(ledger, "credit").version
    assert len(list(ledger.entries(FeatureViewApplied))) == 3
    assert len(list(ledger.entries(FeatureServiceApplied))) == 3


def test_spec_needs_no_module_and_crosses_a_process_as_json(folder: Path, ledger: Ledger) -> None:
    """A replica rebuilds the specification from the ledger alone."""
    apply(load_definitions(write(folder, "defs_gone")), ledger, actor="user:test")
    (folder / "defs_gone.py").unlink()
    spec = service_spec(ledger, "credit")
    assert spec.columns == ["income__amount", "income__sector"]
    assert [field.categorical for field in spec.views[0].fields] == [False, True]
    assert spec == ServiceSpec.from_dict(json.loads(json.dumps(spec.to_dict())))


def test_unknown_names_are_refused_with_the_nearest(folder: Path, ledger: Ledger) -> None:
    """Errors for unknown views, services and versions suggest a similar name."""
    definitions = load_definitions(write(folder, "defs_names"))
    apply(definitions, ledger, actor="user:test")
    with pytest.raises(FeatureViewNotFound, match="Did you mean 'income'"):
        definitions.view("incme")
    apply_with = "Apply it with `python -m feature_jobs.apply definitions=…`"
    with pytest.raises(FeatureViewNotFound, match=f"Did you mean 'income'.* {apply_with}"):
        view_spec(ledger, "incme")
    with pytest.raises(FeatureServiceNotFound, match=f"Did you mean 'credit'.* {apply_with}"):
        service_spec(ledger, "credti")
    with pytest.raises(FeatureServiceNotFound, match="no version 'abc'"):
        service_spec(ledger, "credit", "abc")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "holds no FeatureView"),
        ("import no_such_package_at_all", "imports 'no_such_package_at_all'"),
        (MODULE + "\nother = FeatureView('income', entities=[person], source=source, "
         "schema=[Field('a', 'int64')])", "two definitions named 'income'"),
    ],
)  # fmt: skip
def test_invalid_module_is_refused(folder: Path, text: str, words: str) -> None:
    """A module without views, with a missing import, or with two definitions of one name is refused."""
    name = write(folder, f"defs_bad_{abs(hash(words))}", text=text)
    with pytest.raises(DefinitionError, match=words):
        load_definitions(name)


def test_missing_module_is_refused() -> None:
    """The error names the module."""
    with pytest.raises(DefinitionError, match=r"No module 'no_such_definitions\.inner'"):
        load_definitions("no_such_definitions.inner")
