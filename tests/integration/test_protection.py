"""Tests of the data on disk and of access to it, with a real broker and real policies.

Protected columns contain canaries: marked values that the tests search for.
"""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from cluster.errors import AccessDenied, Unauthenticated
from cluster.ledger.events import AccessDecided, ModelRegistered
from cluster.records.reading import count_records, read_outcomes, read_predictions, read_records
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.scan import scan
from cluster.security.tokens.source import TokenSource
from feature_jobs.store.catalog.protection import view_protection
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.offline.tables import Snapshot, snapshot
from tests.integration.client import Client

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, Range, Sensitivity

patient = FeatureView(
    "patient",
    entities=[Entity("patient", join_keys=["patient_id"])],
    source=FileSource("patient.parquet", event_timestamp="at"),
    schema=[
        Field("ward", "string", sensitivity=Sensitivity.PUBLIC),
        Field("name", "string", sensitivity=Sensitivity.PERSONAL),
        Field("illness", "string", sensitivity=Sensitivity.SENSITIVE),
        Field("age", "float64", sensitivity=Sensitivity.PERSONAL),
    ],
    checks=[Range("age", minimum=0)],
    owner="clinic",
    region="elsewhere",
    purposes=["care"],
)
care = FeatureService("care", views=[patient])
"""
ROWS = 200
MARK = f"{random.getrandbits(40):010x}"
NAME, ILLNESS, WARD, BAD, GIVEN = (
    f"canary-{what}-{MARK}" for what in ("name", "illness", "ward", "bad", "given")
)
AT = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def clinic(falaj_cluster: Project) -> Project:
    """Ingest patients, one of them into quarantine, and serve a model.

    The model's training set is below the storage root.
    """
    root = falaj_cluster.root
    (root / "clinic.py").write_text(DEFINITIONS)
    at = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    frame = pl.DataFrame(
        {
            "patient_id": range(ROWS),
            "at": [at] * ROWS,
            "ward": [WARD] * ROWS,
            "name": [BAD, *[NAME] * (ROWS - 1)],
            "illness": [ILLNESS] * ROWS,
            "age": [-1.0, *[50.0] * (ROWS - 1)],
        }
    )
    frame.write_parquet(root / "patient.parquet")
    people = frame.select("patient_id", event_timestamp="at", y=pl.col("patient_id") // 4 % 2)
    people.write_parquet(root / "patients.parquet")
    definitions = "definitions=clinic"
    falaj_cluster.run("feature_jobs.apply", definitions, check=True)
    falaj_cluster.run("feature_jobs.ingest", definitions, "view=patient", "num_buckets=2", check=True)
    falaj_cluster.run(*training_set("output=.falaj/care.parquet"), check=True)
    learn = (
        "model=lightgbm",
        "name=care",
        "training_set=.falaj/care.parquet",
        "label=y",
        "split.column=patient_id",
    )
    falaj_cluster.run("jobs.train", *learn, check=True)
    falaj_cluster.run("feature_jobs.materialize", definitions, "view=patient", f"as_of={AT}", check=True)
    falaj_cluster.run("serve_apps.deploy", "name=care", "version=1", check=True)
    return falaj_cluster


@pytest.fixture(scope="module")
def answer(clinic: Project) -> dict[str, Any]:
    """Make one prediction by key, with one input in the request, and send its outcome.

    A token with a purpose that the view does not list gets 403.
    """
    client = Client(clinic)
    body = {"entities": [{"patient_id": 1}], "as_of": AT, "features": {"patient__illness": [GIVEN]}}
    path = "/v1/models/care:predict"
    assert client.call(path, body, unit=NAME)[0] == 403, "its purpose is not one of the view's"
    status, content = client.call(path, body, unit=NAME, token=clinic.token(purpose="care"))
    assert status == 200, content
    outcome = {"prediction_id": content["prediction_id"], "outcome": 1}
    assert client.call("/v1/outcomes", {"model": "care", "outcomes": [outcome]})[0] == 200
    return content


def training_set(*more: str) -> tuple[str, ...]:
    return (
        "feature_jobs.training_set",
        "definitions=clinic",
        "service=care",
        "entities=patients.parquet",
        *more,
    )


def token(project: Project, role: str, purpose: str) -> Path:
    path = project.root / f"{role}-{purpose or 'none'}.jwt"
    options = ("--sub", role, "--role", role, "--purpose", purpose, "--output", str(path))
    project.run("cluster.security.identity", "token", *options, check=True)
    return path


def as_scientist(project: Project, purpose: str) -> KeyAccess:
    source = TokenSource(file=str(token(project, "data_scientist", purpose)))
    return KeyAccess(socket=project.record.key_socket, token=source)


def pinned(project: Project, access: KeyAccess) -> Snapshot:
    uri = str(project.storage_root / "features" / "patient")
    spec = view_spec(project.ledger(), "patient")
    return snapshot(uri, view="patient", keys=["patient_id"], protection=view_protection(spec), access=access)


def read(table: Snapshot, *columns: str) -> pl.DataFrame:
    return pl.concat(table.read(bucket, columns) for bucket in range(table.num_buckets))


def test_nothing_protected_lies_in_the_clear(clinic: Project, answer: dict[str, Any]) -> None:
    """No protected value is readable below the storage root, or in Ray's folder and logs.

    As a control, the scanner finds the values in the source.
    """
    source = list(scan([clinic.root / "patient.parquet"], [NAME, ILLNESS, BAD]))
    assert {one.canary for one in source} == {NAME, ILLNESS, BAD}, "the control"
    record = clinic.record
    places = [clinic.storage_root, Path(record.runtime_folder), Path(str(record.gcs_dir))]
    assert list(scan(places, [NAME, ILLNESS, BAD, GIVEN])) == []
    assert any("features" in one.path for one in scan(places, [WARD])), "public columns need no key"
    assert list(clinic.storage_root.glob("models/care/1/*.txt")), "the model has learnt from them"


def test_what_was_served_can_be_read_with_the_keys(clinic: Project, answer: dict[str, Any]) -> None:
    """With the right purpose, the log shows the features that were read or sent in the request.

    The outcomes can be read too. Without the purpose, both are denied.
    """
    for_care, without = (key_store(as_scientist(clinic, purpose)) for purpose in ("care", ""))
    logs = [clinic.storage_root / log / "care" for log in ("predictions", "outcomes")]
    (row,) = read_predictions(logs[0], for_care).iter_rows(named=True)
    assert (row["patient__name"], row["patient__illness"]) == (NAME, GIVEN)
    assert read_outcomes(logs[1], for_care)["outcome"].to_list() == [1]
    for log in logs:
        assert count_records(log) == 1
        with pytest.raises(AccessDenied, match="purpose-not-listed"):
            list(read_records(log, without))


def test_without_the_purpose_the_public_columns_and_no_others(clinic: Project) -> None:
    """Without the purpose, only public columns can be read. The denial names the policy, and is an event."""
    scientist = pinned(clinic, as_scientist(clinic, ""))
    assert set(read(scientist, "ward")["ward"]) == {WARD}
    for column in ("name", "illness", "age"):
        with pytest.raises(AccessDenied, match="purpose-not-listed"):
            read(scientist, column)
    denied = [
        entry.payload["resource"]
        for entry in clinic.ledger().entries(AccessDecided)
        if not entry.payload["allowed"]
    ]
    assert {"features/patient/personal", "features/patient/sensitive"} <= set(denied)


def test_with_the_purpose_both(clinic: Project) -> None:
    """With a listed purpose, public and protected columns can be read.

    A purpose that the view does not list is denied.
    """
    assert set(read(pinned(clinic, as_scientist(clinic, "care")), "ward", "name", "illness")["illness"]) == {
        ILLNESS
    }
    with pytest.raises(AccessDenied):
        read(pinned(clinic, as_scientist(clinic, "marketing")), "name")


def test_by_hand_the_files_show_the_public_columns_and_no_others(clinic: Project) -> None:
    """PyArrow without keys reads only public columns, from the feature table and the training set."""
    files = [
        *(clinic.storage_root / "features" / "patient").rglob("*.parquet"),
        clinic.storage_root / "care.parquet",
    ]
    for path in files:
        prefix = "patient__" if path.name == "care.parquet" else ""
        wards = pq.read_table(path, columns=[f"{prefix}ward"])[f"{prefix}ward"].drop_null()
        assert set(wards.to_pylist()) == {WARD}
        for column in ("name", "illness", "age"):
            with pytest.raises(OSError, match="decrypt"):
                pq.read_table(path, columns=[f"{prefix}{column}"])


@pytest.mark.parametrize(("purpose", "code"), [("care", 0), ("", 2)])
def test_a_job_acts_as_its_token_says(clinic: Project, purpose: str, code: int) -> None:
    """A job has the rights of its token. A refusal is one line without a traceback."""
    mine = f"identity.token_file={token(clinic, 'data_scientist', purpose)}"
    done = clinic.run(*training_set(f"output=out-{purpose}.parquet", mine))
    assert done.returncode == code, done.stderr
    assert (clinic.root / f"out-{purpose}.parquet").exists() == (code == 0)
    if code:
        assert "purpose-not-listed" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("role", "command", "reason"),
    [
        ("data_scientist", "feature_jobs.apply definitions=clinic", "may not apply definitions"),
        ("data_scientist", "feature_jobs.ingest definitions=clinic view=patient", "may not write features"),
        (
            "ml_engineer",
            "jobs.train name=care training_set=.falaj/care.parquet label=y",
            "may not train model",
        ),
        ("service", "serve_apps.deploy name=care version=1", "may not deploy"),
    ],
)
def test_a_role_that_may_not_is_refused_before_anything_is_done(
    clinic: Project, role: str, command: str, reason: str
) -> None:
    """A role without the permission is refused. The ledger records the actor and the entry point."""
    done = clinic.run(*command.split(), f"identity.token_file={token(clinic, role, 'care')}")
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    last = list(clinic.ledger().entries(AccessDecided))[-1]
    assert (last.actor, last.payload["allowed"]) == (role, False)
    assert last.payload["entrypoint"] == command.split()[0]


def test_in_production_who_registered_a_model_does_not_deploy_it(clinic: Project) -> None:
    """In production, the actor that registered a model may not deploy it, whatever the role."""
    (registered,) = (
        entry for entry in clinic.ledger().entries(ModelRegistered) if entry.payload["name"] == "care"
    )
    path = clinic.root / "registrant.jwt"
    options = ("--sub", registered.actor, "--role", "approver", "--output", str(path))
    clinic.run("cluster.security.identity", "token", *options, check=True)
    done = clinic.run(
        "serve_apps.deploy",
        "name=care",
        "version=1",
        "identity.environment=production",
        f"identity.token_file={path}",
    )
    assert done.returncode == 2, done.stderr
    assert "four-eyes" in done.stderr


def test_compacted_and_under_newer_keys_a_table_gives_the_same_training_set(clinic: Project) -> None:
    """Compaction and key rotation do not change the training set.

    A data engineer may compact a table that this role may not read. Only an admin may rotate keys.
    """
    frame = pl.read_parquet(clinic.root / "patient.parquet").with_columns(
        pl.col("at") - dt.timedelta(days=1), name=pl.lit(NAME), age=pl.lit(50.0)
    )
    frame.write_parquet(clinic.root / "earlier.parquet")
    definitions = ("definitions=clinic", "view=patient")
    clinic.run("feature_jobs.ingest", *definitions, "source.path=earlier.parquet", check=True)
    before = clinic.run(*training_set("output=before.parquet"), check=True).stdout
    engineer = f"identity.token_file={token(clinic, 'data_engineer', 'care')}"
    compacted = clinic.run("feature_jobs.compact", *definitions, engineer, check=True)
    assert "4 files replaced, 2 left" in compacted.stdout
    refused = clinic.run("feature_jobs.rotate_keys", *definitions, engineer)
    assert (refused.returncode, "may not manage keys" in refused.stderr) == (2, True)
    rotated = clinic.run("feature_jobs.rotate_keys", *definitions, check=True)
    assert "2 files of the table and 1 quarantined rewritten" in rotated.stdout
    assert clinic.run(*training_set("output=after.parquet"), check=True).stdout == before
    wrapped = protected_files(clinic.owner).keys(
        next(str(path) for path in (clinic.storage_root / "quarantine" / "patient").glob("*.parquet"))
    )
    assert {text.split(":")[1] for text in wrapped.wrapped.values()} == {"v2"}
    kinds = [entry.type for entry in clinic.ledger().entries()]
    assert kinds.count("FeatureTableRewritten") == 2
    assert kinds.count("KeysRotated") == 8, "one of each key"


def test_another_process_without_a_token_gets_no_key(clinic: Project, tmp_path: Path) -> None:
    """A forged token gets no key."""
    (tmp_path / "forged.jwt").touch(mode=0o600)
    (tmp_path / "forged.jwt").write_text("eyJhbGciOiJub25lIn0.eyJzdWIiOiJldmUifQ.")
    access = KeyAccess(socket=clinic.record.key_socket, token=TokenSource(file=str(tmp_path / "forged.jwt")))
    with pytest.raises(Unauthenticated):
        read(pinned(clinic, access), "name")
