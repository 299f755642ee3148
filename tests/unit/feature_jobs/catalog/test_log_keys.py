"""Keys of a log are as strict as the features behind its predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.registry import Lineage, ModelVersion
from cluster.security.keys.store import KeyInfo
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, Sensitivity
from feature_jobs.store.catalog.log_keys import (
    NO_COMMON_PURPOSE,
    log_keys,
    merged_key,
    outcome_key,
    prediction_key,
    with_read_features,
)
from feature_jobs.store.catalog.specifications import Definitions, apply, service_spec
from tests.samples.model_versions import model_version

PERSON = Entity("person", join_keys=["id"])


def view(name: str, *classes: Sensitivity, purposes: tuple[str, ...] = (), region: str = "") -> FeatureView:
    return FeatureView(
        name,
        entities=[PERSON],
        source=FileSource(f"{name}.parquet", event_timestamp="at"),
        schema=[Field(f"f{n}", "float64", sensitivity=one) for n, one in enumerate(classes)],
        owner="test",
        purposes=purposes,
        region=region or None,
    )


def served(tmp_path: Path, *views: FeatureView) -> tuple[Ledger, ModelVersion]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    service = FeatureService("s", views=list(views))
    definitions = Definitions(module="m", views={one.name: one for one in views}, services={"s": service})
    apply(definitions, ledger, actor="test")
    lineage = Lineage(training_set_hash="", service="s", service_version=service.version)
    return ledger, model_version(lineage, name="loan")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([Sensitivity.PUBLIC], "personal"),
        ([Sensitivity.PUBLIC, Sensitivity.PERSONAL], "personal"),
        ([Sensitivity.SENSITIVE, Sensitivity.INTERNAL], "sensitive"),
    ],
)
def test_key_has_the_highest_class_of_the_features(
    tmp_path: Path, classes: list[Sensitivity], expected: str
) -> None:
    """The class is at least personal."""
    ledger, version = served(tmp_path, view("a", *classes))
    predictions, outcomes = log_keys(ledger, version, region="here")
    assert (predictions.name, predictions.column_class) == (f"predictions/loan/{expected}", expected)
    assert predictions.name == prediction_key(ledger, version)
    assert (outcomes.name, outcomes.column_class) == (outcome_key("loan"), "sensitive")
    assert {one.region for one in (predictions, outcomes)} == {"here"}


def test_key_without_declared_features_is_sensitive(tmp_path: Path) -> None:
    """Clients may send any data."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    version = model_version(name="loan")
    assert [one.column_class for one in log_keys(ledger, version, region="here")] == ["sensitive"] * 2


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ((), (), ()),
        (("credit", "fraud"), (), ("credit", "fraud")),
        (("credit", "fraud"), ("fraud",), ("fraud",)),
        (("credit",), ("fraud",), (NO_COMMON_PURPOSE,)),
    ],
)
def test_key_allows_only_purposes_of_every_view(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    """Views without a common purpose allow none, not all."""
    personal = Sensitivity.PERSONAL
    ledger, version = served(
        tmp_path, view("a", personal, purposes=first), view("b", personal, purposes=second, region="there")
    )
    for key in log_keys(ledger, version, region="here"):
        assert key.purposes == allowed
        assert key.region == "there"


@pytest.mark.parametrize(
    ("first", "second", "needed"),
    [
        (Sensitivity.PUBLIC, Sensitivity.PUBLIC, ("public", ())),
        (Sensitivity.INTERNAL, Sensitivity.PUBLIC, ("internal", ())),
        (Sensitivity.PERSONAL, Sensitivity.PUBLIC, ("personal", ("credit", "fraud"))),
        (Sensitivity.PERSONAL, Sensitivity.SENSITIVE, ("sensitive", ("fraud",))),
    ],
)
def test_caller_needs_a_purpose_of_all_protected_views(
    tmp_path: Path, first: Sensitivity, second: Sensitivity, needed: tuple[str, tuple[str, ...]]
) -> None:
    """Public and internal columns are for every purpose."""
    ledger, version = served(
        tmp_path, view("a", first, purposes=("credit", "fraud")), view("b", second, purposes=("fraud",))
    )
    lineage = version.lineage
    views = service_spec(ledger, lineage.service, lineage.service_version).views
    used = with_read_features(version.resource(region="here"), views, region="here")
    assert (used.column_class, used.purposes, used.kind, used.name) == (*needed, "model", "loan")
    assert used.region == "here"
    moved = with_read_features(
        version.resource(region="here"), [views[0], replace(views[1], region="there")], region="here"
    )
    assert moved.region == "there"


@pytest.mark.parametrize(
    ("existing", "wanted", "expected"),
    [
        ((), (), ()),
        ((), ("care",), ("care",)),
        (("care",), (), ("care",)),
        (("care", "fraud"), ("care", "ads"), ("care",)),
    ],
)
def test_later_version_never_widens_an_earlier_versions_key(
    existing: tuple[str, ...], wanted: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    """Both share a key; its purposes only become fewer, also by a version without a feature service."""
    name = outcome_key("loan")
    merged = merged_key(KeyInfo(name=name, purposes=existing), KeyInfo(name=name, purposes=wanted))
    assert merged.purposes == expected


def test_version_without_a_common_purpose_is_refused() -> None:
    """Otherwise, the records of one version would be unreadable, or readable for a wrong purpose."""
    name = outcome_key("loan")
    with pytest.raises(RefusedError, match=r"are for care.*ads"):
        merged_key(KeyInfo(name=name, purposes=("care",)), KeyInfo(name=name, purposes=("ads",)))
