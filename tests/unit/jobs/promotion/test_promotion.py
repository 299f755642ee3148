"""A model version moves from one installation to another, without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import AccessDenied, ConfigError, RefusedError
from cluster.ledger.chain import verify_chain
from cluster.ledger.events import ModelExported, ModelRegistered
from cluster.lineage.trace import describe, read_entries, trace_model
from cluster.registry import Lineage
from cluster.runtime import InputSpec, Precision, load_model
from cluster.security.tokens.roles import Role
from cluster.settings import Tier
from feature_jobs.store import FeatureService, Field, FileSource
from feature_jobs.store.definitions.missing import Missing
from feature_jobs.store.definitions.views import Sensitivity
from jobs.promotion.definitions import DefinitionsDiffer
from jobs.promotion.importing import ImportPrecision
from tests.projects.views import apply_service, make_view
from tests.samples.installations import Installation, signed_for
from tests.samples.network import rows, write_network
from tests.samples.signatures import of_each_task
from tests.samples.trees import write_trees

INPUTS = (
    InputSpec(name="income__amount", dtype="float64"),
    InputSpec(name="income__sector", dtype="string", categories=("farm", "shop")),
)
SIGNATURE = of_each_task(*INPUTS).binary


def service(**changes: Any) -> FeatureService:
    """Return the service that the model reads. `changes` replaces parts of its view."""
    schema = [Field("amount", "float64"), Field("sector", "string")]
    return FeatureService("credit", views=[make_view(**{"schema": schema, **changes})])


@pytest.fixture
def staging(tmp_path: Path) -> Installation:
    """Return an installation with version 1 of the model `m`, which reads the service `credit`."""
    installation = Installation(root=tmp_path / "staging")
    folder = tmp_path / "trees"
    write_trees(folder, signed_for(SIGNATURE, service()))
    installation.register(folder, service=service())
    return installation


@pytest.fixture
def production(tmp_path: Path, staging: Installation) -> Installation:
    """Return an installation that trusts `staging` and has the same features from another file."""
    installation = Installation(root=tmp_path / "production")
    installation.trust(staging, "staging")
    apply_service(installation.ledger, service(source=FileSource("other.parquet", event_timestamp="at")))
    return installation


@pytest.fixture
def bundle(tmp_path: Path, staging: Installation) -> Path:
    staging.export(tmp_path / "m-1.falaj")
    return tmp_path / "m-1.falaj"


def assert_nothing_registered(installation: Installation) -> None:
    assert installation.registry.names() == []
    assert not Path(installation.places.models("m")).exists()


def test_an_imported_version_gives_the_same_scores_and_names_its_origin(
    staging: Installation, production: Installation, bundle: Path
) -> None:
    """Files are encrypted with the importer's keys, and the service is the importer's own."""
    text = production.take(bundle)
    assert "imported m version 1: version 1 of 'staging'" in text
    here, there = production.registry.get("m", 1), staging.registry.get("m", 1)
    matrix = rows(SIGNATURE, 50, seed=3)
    scores = [
        load_model(version, keys).predict_matrix(matrix).scores
        for version, keys in ((here, production.keyring), (there, staging.keyring))
    ]
    assert np.array_equal(*scores)
    assert here.origin["installation"] == "staging"
    assert here.origin["entry_hash"] == next(staging.ledger.entries(ModelRegistered)).hash
    assert (here.registered_by, here.metrics, here.origin["registered_by"]) == ("eve", {"auc": 0.9}, "sam")
    assert here.lineage.service_version != there.lineage.service_version == here.origin["service_version"]
    with pytest.raises(RefusedError):
        load_model(here, staging.keyring)
    trace = trace_model(read_entries(production.ledger, "m", 1), "m", 1)
    assert "imported: version 1 of 'staging', registered there by sam" in describe(trace)


def test_a_model_without_its_definitions_in_the_ledger_is_not_exported(tmp_path: Path) -> None:
    """Its training set came from another installation, so nothing here says what its features mean."""
    source = Installation(root=tmp_path / "a")
    write_trees(tmp_path / "trees", signed_for(SIGNATURE, service()))
    source.register(tmp_path / "trees", lineage=Lineage(training_set_hash="t", service="credit"))
    with pytest.raises(DefinitionsDiffer, match="'credit', which was never applied here"):
        source.export(tmp_path / "m.falaj")


def test_an_export_is_an_event_and_a_private_file_that_tar_can_read(
    staging: Installation, bundle: Path
) -> None:
    """The card says what the ledger knows, and the event names the file's parts."""
    event = next(staging.ledger.entries(ModelExported)).payload
    assert bundle.stat().st_mode & 0o777 == 0o600
    with tarfile.open(bundle) as archive:
        names = archive.getnames()
        card = json.load(archive.extractfile("card.json") or pytest.fail("no card"))
    assert names[1:] == sorted(event["parts"])
    assert (card["model"], card["metrics"], card["registered_by"]) == ("m", {"auc": 0.9}, "sam")
    assert [column["column"] for column in card["columns"]] == ["income__amount", "income__sector"]
    assert len(list(verify_chain(staging.ledger.entries()))) == staging.ledger.head()


def test_a_second_import_and_the_exporters_own_are_refused(
    staging: Installation, production: Installation, bundle: Path, tmp_path: Path
) -> None:
    """Another export of the same version is refused too. The messages name the version."""
    production.take(bundle)
    staging.export(tmp_path / "again.falaj")
    for file in (bundle, tmp_path / "again.falaj"):
        with pytest.raises(RefusedError, match="m version 1 of 'staging' is here already, as version 1"):
            production.take(file)
    with pytest.raises(RefusedError, match="This installation exported the bundle: it has m version 1"):
        staging.take(bundle)
    assert production.registry.versions("m") == [1]


def test_an_unknown_exporter_is_refused_and_says_how_to_trust_it(
    production: Installation, bundle: Path, staging: Installation
) -> None:
    (production.trusted / "staging.pub.pem").unlink()
    with pytest.raises(
        ConfigError, match=r"not trusted.*keys/ledger\.pub\.pem to .*/trusted/<its name>\.pub\.pem"
    ):
        production.take(bundle)
    production.trust(staging, "staging")
    (production.trusted / "staging.pub.pem").chmod(0o666)
    with pytest.raises(ConfigError, match=r"Another user can change .*staging\.pub\.pem"):
        production.take(bundle)
    assert_nothing_registered(production)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": rows}, "feature view 'income'.*transform is none in the bundle and"),
        (
            {"schema": [Field("amount", "float32"), Field("sector", "string")]},
            "column amount dtype is float64",
        ),
        ({"schema": [Field("sector", "string")]}, "column amount is float64"),
        ({"ttl": timedelta(hours=1)}, "its TTL is None s in the bundle and 3600 s here"),
        ({"created_lag": timedelta(hours=1)}, "created_lag"),
    ],
)
def test_features_of_another_meaning_are_refused_by_name(
    tmp_path: Path, staging: Installation, bundle: Path, change: dict[str, Any], message: str
) -> None:
    """Code, types, TTL and lag must be equal; the place of the source may differ (see above)."""
    other = Installation(root=tmp_path / "other")
    other.trust(staging, "staging")
    with pytest.raises(DefinitionsDiffer, match="'credit', which is not applied here"):
        other.take(bundle)
    apply_service(other.ledger, service(**change))
    with pytest.raises(DefinitionsDiffer, match=message):
        other.take(bundle)
    assert_nothing_registered(other)


def test_other_rules_for_missing_values_are_refused(
    tmp_path: Path, staging: Installation, bundle: Path
) -> None:
    other = Installation(root=tmp_path / "other")
    other.trust(staging, "staging")
    apply_service(other.ledger, FeatureService("credit", views=service().views, missing=Missing.REFUSE))
    with pytest.raises(DefinitionsDiffer, match="rules for missing values differ"):
        other.take(bundle)


def test_policies_decide_by_role_class_purpose_and_region(tmp_path: Path) -> None:
    """An export and an import need the role, a purpose that the columns list, and their region."""
    schema = [Field("amount", "float64", sensitivity=Sensitivity.SENSITIVE), Field("sector", "string")]
    governed = service(schema=schema, purposes=["credit"], region="eu")
    source = Installation(root=tmp_path / "a", region="eu", environment="production")
    write_trees(tmp_path / "trees", signed_for(SIGNATURE, governed))
    source.register(tmp_path / "trees", service=governed)
    file = tmp_path / "m.falaj"
    for role, purpose, message in (
        (Role.data_engineer, "credit", "no policy permits it"),
        (Role.ml_engineer, "", "purpose-not-listed"),
        (Role.ml_engineer, "fraud", "purpose-not-listed"),
    ):
        with pytest.raises(AccessDenied, match=message):
            source.export(file, actor=source.actor(role, purpose=purpose))
    assert not file.exists()
    assert list(source.ledger.entries(ModelExported)) == []
    source.export(file, actor=source.actor(purpose="credit"))
    for region, role, purpose, message in (
        ("ae", Role.ml_engineer, "credit", "other-region"),
        ("eu", Role.data_scientist, "credit", "no policy permits it"),
        ("eu", Role.ml_engineer, "fraud", "purpose-not-listed"),
        ("eu", Role.ml_engineer, "credit", None),
    ):
        target = Installation(
            root=tmp_path / f"{region}{role}{purpose}", region=region, environment="production"
        )
        target.trust(source, "a")
        apply_service(target.ledger, governed)
        actor = target.actor(role, purpose=purpose)
        if message is None:
            target.take(file, actor=actor)
        else:
            with pytest.raises(AccessDenied, match=message):
                target.take(file, actor=actor)
            assert_nothing_registered(target)


def test_a_network_of_a_gpu_installation_arrives_as_int8_on_cpus(tmp_path: Path) -> None:
    """The int8 version has no weights for a GPU, and states how far its scores differ. `exported` keeps float32."""
    gpus = Installation(root=tmp_path / "gpus", tier=Tier.enterprise_gpu)
    write_network(tmp_path / "network", SIGNATURE, width=64)
    gpus.register(tmp_path / "network")
    export = gpus.export(tmp_path / "m.falaj")
    assert export.parity is not None
    cpus = Installation(root=tmp_path / "cpus")
    cpus.trust(gpus, "gpus")
    assert "as int8: on 256 reference rows" in cpus.take(tmp_path / "m.falaj")
    int8 = cpus.registry.get("m", 1)
    assert sorted(int8.files) == ["model.json", "model.onnx"]
    model, float32 = load_model(int8, cpus.keyring), load_model(gpus.registry.get("m", 1), gpus.keyring)
    assert model.signature.precision is Precision.int8
    matrix = rows(SIGNATURE, 100)
    difference = np.abs(model.predict_matrix(matrix).scores - float32.predict_matrix(matrix).scores)
    assert 0 < difference.max() < 0.1
    assert int8.origin["parity"] == export.parity
    assert "imported as int8" in int8.warnings[0]
    with pytest.raises(RefusedError, match="already, as version 1"):
        cpus.take(tmp_path / "m.falaj", precision=ImportPrecision.int8)
    cpus.take(tmp_path / "m.falaj", precision=ImportPrecision.exported)
    assert "model.safetensors" in cpus.registry.get("m", 2).files


def test_int8_of_trees_is_refused(production: Installation, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="the bundle has none"):
        production.take(bundle, precision=ImportPrecision.int8)
    assert_nothing_registered(production)


def test_another_import_at_the_same_time_is_refused(production: Installation, bundle: Path) -> None:
    """A killed import holds no lock."""
    program = (
        "import sys; from pathlib import Path; from jobs.promotion.importing import import_lock\n"
        f"with import_lock(Path({str(Path(production.places.runs))!r})):\n print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match="Another import runs"):
        production.take(bundle)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    production.take(bundle)


def test_an_imported_version_can_be_exported_again(
    tmp_path: Path, production: Installation, bundle: Path
) -> None:
    """The third installation's event names both earlier installations."""
    production.take(bundle)
    production.export(tmp_path / "second.falaj")
    third = Installation(root=tmp_path / "third")
    third.trust(production, "production")
    apply_service(third.ledger, service())
    third.take(tmp_path / "second.falaj")
    origin = third.registry.get("m", 1).origin
    assert (origin["installation"], origin["before"]["installation"]) == ("production", "staging")
