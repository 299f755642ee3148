"""The principal of a job: real tokens, real policies, a real ledger."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AccessDenied, ConfigError, Unauthenticated
from cluster.ledger import Ledger
from cluster.ledger.events import AccessDecided, StrangersRefused
from cluster.security import acting
from cluster.security.acting import Actor, check_reader, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.tokens.intent import FILE_VARIABLE, mint_intent, write_intent
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.principal import TokenVerifier
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, write_record
from cluster.settings import IdentityConfig, IssuerConfig, PlatformConfig, StorageConfig, Tier, VaultConfig
from cluster.storage import Layout
from tests.servers import replica
from tests.servers.key_broker import running_broker
from tests.servers.oidc_issuer import Issuer
from tests.servers.polling import wait_until
from tests.servers.vault_double import VaultDouble

JOB = "feature_jobs.ingest"
VIEW = Resource(kind="feature view", name="income")
Act = Callable[..., Actor]


@pytest.fixture
def places(tmp_path: Path) -> Layout:
    places = Layout(str(tmp_path))
    ensure_issuer(places)
    return places


@pytest.fixture
def ledger(places: Layout) -> Ledger:
    return Ledger(f"sqlite:///{places.ledger_path}")


def record(places: Layout, **installed: object) -> ClusterRecord:
    return dataclasses.replace(replica.record(Path(places.root), "", 1), **installed)  # type: ignore[arg-type]


def config(places: Layout, **identity: Any) -> PlatformConfig:
    return PlatformConfig(storage=StorageConfig(root=places.root), identity=IdentityConfig(**identity))


@pytest.fixture
def act(places: Layout, ledger: Ledger) -> Act:
    """Return a function that creates the actor of a job with this configured identity."""
    return lambda **identity: create_actor(config(places, **identity), record(places), ledger, entrypoint=JOB)


def as_alice(places: Layout, tmp_path: Path, *, role: Role, purpose: str = "") -> str:
    path = tmp_path / "alice.jwt"
    write_intent(path, mint_token(places, subject="alice", role=role, purpose=purpose))
    return str(path)


def test_without_a_token_the_local_user_acts(act: Act) -> None:
    """With the configured role and purpose, for this entrypoint only."""
    actor = act(role="data_engineer", purpose="care")
    assert actor.name.startswith("user:")
    assert (actor.principal.role, actor.principal.purpose) == (Role.data_engineer, "care")
    assert actor.principal.entrypoint == JOB
    actor.check(Action.write_features, VIEW)


def test_access_token_is_exchanged_for_an_intent(act: Act, places: Layout, tmp_path: Path) -> None:
    """With the same subject, role, purpose and tenant. The intent is in a private file, and workers get its path.

    A token file that others can read is refused.
    """
    token_file = as_alice(places, tmp_path, role=Role.data_engineer)
    actor = act(token_file=token_file)
    assert (actor.name, actor.principal.entrypoint) == ("alice", JOB)
    intent_path = actor.access.token.path() or Path()
    assert intent_path.stat().st_mode & 0o777 == 0o600
    assert intent_path.parent.stat().st_mode & 0o777 == 0o700
    assert intent_path.read_text() not in repr(actor)
    assert dataclasses.asdict(actor.access)["entrypoint"] == JOB, "plain data"
    Path(token_file).chmod(0o644)
    with pytest.raises(ConfigError, match="0600"):
        act(token_file=token_file)


def test_intent_is_used_unchanged_for_its_entrypoint(
    act: Act, places: Layout, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is true if the environment names the intent. An intent for another job is refused and counted."""
    token = mint_token(places, subject="alice", role=Role.data_engineer, purpose="")
    alice = TokenVerifier.of(places).verify(token)
    path = tmp_path / "intent.jwt"
    write_intent(path, mint_intent(places, alice, entrypoint=JOB))
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    assert act().access.token.path() == path
    with pytest.raises(Unauthenticated, match=r"not for 'feature_jobs\.apply'"):
        create_actor(config(places), record(places), ledger, entrypoint="feature_jobs.apply")
    (counted,) = ledger.entries(StrangersRefused)
    assert counted.payload["count"] == 1


@pytest.mark.parametrize(
    ("identity", "match"),
    [
        ({"role": "king"}, "identity.role=king"),
        ({"role": "supervisor"}, "identity.role=supervisor"),
        ({"token_file": "/nowhere.jwt"}, "/nowhere.jwt"),
    ],
)
def test_invalid_identity_setting_is_refused(act: Act, identity: dict[str, str], match: str) -> None:
    """The message names the setting."""
    with pytest.raises(ConfigError, match=match):
        act(**identity)


def test_denial_is_an_event_with_principal_resource_and_policy(
    act: Act, places: Layout, ledger: Ledger, tmp_path: Path
) -> None:
    """The check stops at the first denied resource."""
    token_file = as_alice(places, tmp_path, role=Role.data_scientist)
    actor = act(token_file=token_file)
    sensitive = Resource(kind="feature view", name="illness", column_class="sensitive", purposes=("care",))
    with pytest.raises(AccessDenied, match="purpose-not-listed"):
        actor.check(Action.build_training_set, VIEW, sensitive, VIEW)
    denied = [entry for entry in ledger.entries(AccessDecided) if not entry.payload["allowed"]]
    assert [(entry.actor, entry.payload["resource"], entry.payload["entrypoint"]) for entry in denied] == [
        ("alice", "illness", JOB)
    ]
    assert "purpose-not-listed" in denied[0].payload["policies"]


def test_registrant_may_not_release_the_model_in_production(
    places: Layout, ledger: Ledger, tmp_path: Path
) -> None:
    """Another principal may, and the registrant may roll it back."""
    token_file = as_alice(places, tmp_path, role=Role.approver)
    production = config(places, token_file=token_file, environment="production")
    actor = create_actor(production, record(places), ledger, entrypoint="serve_apps.rollout")
    own_model, other_model = (
        Resource(kind="model", name="loan", registered_by=who) for who in ("alice", "bob")
    )
    actor.check(Action.rollout, other_model)
    actor.check(Action.rollback, own_model)
    with pytest.raises(AccessDenied, match="four-eyes"):
        actor.check(Action.rollout, own_model)


@pytest.mark.parametrize("requested", ["local", "production"])
def test_command_line_cannot_weaken_a_production_cluster(
    places: Layout, ledger: Ledger, tmp_path: Path, requested: str
) -> None:
    """The four-eyes rule holds, whatever environment the command line names."""
    token_file = as_alice(places, tmp_path, role=Role.approver)
    model = Resource(kind="model", name="loan", registered_by="alice", region="oman")
    job_config = config(places, token_file=token_file, environment=requested)
    actor = create_actor(
        job_config,
        record(places, policy_environment="production", region="oman"),
        ledger,
        entrypoint="serve_apps.deploy",
    )
    with pytest.raises(AccessDenied, match="four-eyes"):
        actor.check(Action.deploy, model)
    actor.check(Action.deploy, dataclasses.replace(model, registered_by="bob"))
    assert (job_config.identity.environment, job_config.cluster.region) == ("production", "oman"), (
        "for replicas"
    )


def test_stricter_environment_may_be_requested(places: Layout, ledger: Ledger) -> None:
    strict = config(places, environment="production")
    assert create_actor(
        strict, record(places, policy_environment="local"), ledger, entrypoint=JOB
    ).environment == ("production")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"environment": "staging"}, "identity.environment=staging"),
        ({"issuer": IssuerConfig(url="https://mine.example")}, "identity.issuer.url=https://mine.example"),
    ],
)
def test_contradiction_of_the_cluster_is_refused(
    places: Layout, ledger: Ledger, changed: dict[str, Any], match: str
) -> None:
    """A weaker environment, another issuer, another region."""
    issuer = dataclasses.asdict(IssuerConfig(url="https://ours.example"))
    production = record(places, policy_environment="production", region="oman", issuer=issuer)
    with pytest.raises(ConfigError, match=match):
        create_actor(config(places, **changed), production, ledger, entrypoint=JOB)
    elsewhere = config(places)
    elsewhere.cluster.region = "eu"
    with pytest.raises(ConfigError, match=r"cluster\.region=eu"):
        create_actor(elsewhere, production, ledger, entrypoint=JOB)


def test_oidc_issuer_of_the_cluster_is_not_bypassed(places: Layout, ledger: Ledger) -> None:
    """The development issuer's key may be left from an earlier use of the folder. Its tokens are refused."""
    issuer = dataclasses.asdict(IssuerConfig(url="https://127.0.0.1:1"))
    with pytest.raises(ConfigError, match="A job needs an intent of https://127"):
        create_actor(config(places), record(places, issuer=issuer), ledger, entrypoint=JOB)


@pytest.mark.parametrize("side", ["config", "record"])
def test_enterprise_tier_never_accepts_the_dev_issuer(places: Layout, ledger: Ledger, side: str) -> None:
    """Whether configuration or record names the tier."""
    job_config, tier = config(places), Tier.enterprise_gpu
    if side == "config":
        job_config.tier = tier
    cluster_record = record(places, tier=tier.value if side == "record" else None)
    with pytest.raises(ConfigError, match="does not accept the development issuer"):
        create_actor(job_config, cluster_record, ledger, entrypoint=JOB)


def test_intent_is_renewed_while_the_job_lives(act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of a day can still register its model."""
    monkeypatch.setattr(acting, "RENEW_S", 0.01)
    actor = act()
    path = actor.access.token.path() or Path()
    first = path.read_text()
    wait_until(lambda: path.read_text() != first)


def test_expired_intent_of_a_killed_job_is_removed(act: Act, places: Layout) -> None:
    folder = Path(places.keys) / "intents"
    folder.mkdir(mode=0o700)
    old, fresh = folder / "old.jwt", folder / "fresh.jwt"
    for path in (old, fresh):
        path.write_text("left")
    os.utime(old, (0, 0))
    act()
    assert (old.exists(), fresh.exists()) == (False, True)


def test_worker_verifies_the_intent(act: Act) -> None:
    """Before it requests a key."""
    with running_broker() as broker:
        actor = act()
        access = dataclasses.replace(actor.access, socket=broker.socket)
        key_store(access)
        with pytest.raises(Unauthenticated, match=r"not for 'jobs\.train'"):
            key_store(dataclasses.replace(access, entrypoint="jobs.train"))


def test_log_lines_name_the_principal(
    places: Layout, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all loggers of the process and every name."""
    output = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(output)])
    path = tmp_path / "alice.jwt"
    write_intent(path, mint_token(places, subject="100%s alice", role=Role.admin, purpose=""))
    create_actor(config(places, token_file=str(path)), record(places), ledger, entrypoint=JOB)
    logging.getLogger("anything").warning("careful")
    assert output.getvalue().endswith(" WARNING 100%s alice anything: careful\n")


def test_ledger_reader_needs_a_token_of_the_clusters_issuer(
    places: Layout, ledger: Ledger, tmp_path: Path
) -> None:
    """A token of the development issuer is refused if the cluster uses another issuer, and is counted."""
    issuer, dev = Issuer(), tmp_path / "dev.jwt"
    write_intent(dev, mint_token(places, subject="eve", role=Role.auditor, purpose=""))
    trusted = dataclasses.asdict(IssuerConfig(url=issuer.url))
    write_record(record(places, issuer=trusted), StorageConfig(root=places.root))
    try:
        auditor, scientist = tmp_path / "auditor.jwt", tmp_path / "scientist.jwt"
        write_intent(auditor, issuer.token(role="auditor"))
        write_intent(scientist, issuer.token(role="data_scientist"))
        check_reader(ledger, places, auditor)
        with pytest.raises(AccessDenied):
            check_reader(ledger, places, scientist)
        with pytest.raises(Unauthenticated):
            check_reader(ledger, places, dev)
    finally:
        issuer.close()
    assert [entry.payload["count"] for entry in ledger.entries(StrangersRefused)] == [1]


@pytest.mark.parametrize("kind", ["intent", "access token"])
def test_token_in_vault_is_fetched_and_renewed(
    places: Layout, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With a Vault double. Workers get the path of a local file."""
    monkeypatch.setattr(acting, "RENEW_S", 0.02)
    access = mint_token(places, subject="alice", role=Role.data_engineer, purpose="care")
    alice = TokenVerifier.of(places).verify(access)
    tokens = [mint_intent(places, alice, entrypoint=JOB) if kind == "intent" else access for _ in range(2)]
    secret = tmp_path / "secret-id"
    write_intent(secret, "canary-secret-id")
    with VaultDouble() as double:
        double.state.approles["falaj"] = "canary-secret-id"
        double.state.kv["jobs/ingest"] = [{"jwt": tokens[0]}]
        job_config = config(places, token_file="vault:jobs/ingest#jwt")
        job_config.secrets.vault = VaultConfig(address=double.address, secret_file=str(secret))
        actor = create_actor(job_config, record(places), ledger, entrypoint=JOB)
        assert (actor.name, actor.principal.entrypoint, actor.principal.purpose) == ("alice", JOB, "care")
        path = actor.access.token.path() or Path()
        assert path.parent == Path(places.keys) / "intents"
        first = path.read_text()
        double.state.kv["jobs/ingest"].append({"jwt": tokens[1]})
        wait_until(lambda: path.read_text() != first)
        for reference, match in (
            ("vault:jobs/ingest", "must be vault:"),
            ("vault:jobs/ingest#none", "no token"),
        ):
            job_config.identity.token_file = reference
            with pytest.raises(ConfigError, match=match):
                create_actor(job_config, record(places), ledger, entrypoint=JOB)
