"""The choice of the key store. The broker checks the policies for both stores. Uses a Vault double."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from cluster import up
from cluster.errors import AccessDenied, ConfigError, Unauthenticated
from cluster.node.launch import overrides as overrides_of
from cluster.security.authorization.policy import Decision, Policy, Resource
from cluster.security.keys import vault_session
from cluster.security.keys.broker import Broker
from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.configured import open_store
from cluster.security.keys.gate import Gate, Operation
from cluster.security.keys.guarded import ACTIONS
from cluster.security.keys.kek import SALT_BYTES, Derivation
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyEncryptionKeyWrong, KeyInfo
from cluster.security.keys.vault import VaultKeyStore
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.principal import Principal, TokenVerifier
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig
from cluster.settings_conversion import load
from cluster.storage import Layout
from tests.servers.key_broker_world import INFO, SECRET
from tests.servers.polling import wait_until
from tests.servers.vault_double import VaultDouble

ADDRESS = "secrets.vault.address=https://vault:8200"


def chosen(root: Path, *overrides: str) -> PlatformConfig:
    """Return the configuration with these command-line overrides."""
    composed = _composed(*overrides).copy()
    composed.storage.root = str(root)
    return load(composed, PlatformConfig)


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_module("configs", version_base=None):
        composed = compose("cluster", overrides=list(overrides))
    return OmegaConf.masked_copy(composed, list(PlatformConfig.__dataclass_fields__))


@pytest.fixture
def stopped() -> Iterator[threading.Event]:
    """Event that ends the renewal of the login."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """File with the secret id of the AppRole."""
    path = tmp_path / "secret-id"
    path.touch(mode=0o600)
    path.write_text("canary-secret-id\n")
    return path


@pytest.fixture
def in_vault(tmp_path: Path, double: VaultDouble, secret_file: Path) -> PlatformConfig:
    """Configuration of an installation with keys in Vault."""
    config = chosen(
        tmp_path, "secrets=vault", "tier=enterprise_gpu", ADDRESS, "secrets.vault.secret_file=/secret"
    )
    config.secrets.vault.address, config.secrets.vault.secret_file = double.address, str(secret_file)
    return config


@contextlib.contextmanager
def serving(config: PlatformConfig, stopped: threading.Event) -> Iterator[tuple[Path, Layout]]:
    """Run a broker over the configured store, with the real policies and tokens of the development issuer."""
    folder = Path(tempfile.mkdtemp(prefix="fk-"))
    places, policy = Layout(str(folder / "root")), Policy.load()
    ensure_issuer(places)

    def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
        return policy.decide(principal, ACTIONS[operation], Resource.from_key(info))

    gate = Gate(
        open_store(config, stopped=stopped),
        verify=TokenVerifier.of(places).verify,
        decide=decide,
        audit=lambda denial: None,
    )
    broker = Broker(gate, folder / "run" / "broker.sock")
    thread = threading.Thread(target=broker.run, args=(stopped,))
    thread.start()
    try:
        wait_until((folder / "run" / "broker.sock").exists)
        yield folder / "run" / "broker.sock", places
    finally:
        stopped.set()
        thread.join()
        shutil.rmtree(folder)


def test_production_tier_refuses_the_keyring_unless_acknowledged(
    tmp_path: Path, stopped: threading.Event
) -> None:
    """Refused before the start, and again when the broker opens the store. The small tier needs no setting."""
    config = chosen(tmp_path, "tier=enterprise_gpu")
    for check in (lambda: up.check(config), lambda: open_store(config, stopped=stopped)):
        with pytest.raises(ConfigError, match=r"secrets=vault, or secrets\.acknowledge_keyring=true"):
            check()
    assert not (tmp_path / "keys").exists()
    acknowledged = chosen(tmp_path, "tier=enterprise_gpu", "secrets.acknowledge_keyring=true")
    for accepted in (acknowledged, chosen(tmp_path)):
        assert isinstance(open_store(accepted, stopped=stopped), Keyring)


def test_broker_checks_the_policies_before_it_calls_vault(
    in_vault: PlatformConfig, double: VaultDouble, stopped: threading.Event
) -> None:
    """A denied request never reaches Vault."""
    with serving(in_vault, stopped) as (socket, places):

        def client(role: Role, purpose: str) -> BrokerKeyStore:
            token = mint_token(places, subject="alice", role=role, purpose=purpose)
            return BrokerKeyStore(socket, lambda: token)

        owner = client(Role.admin, "")
        owner.ensure(INFO)
        wrapped = client(Role.data_engineer, "credit_scoring").wrap(INFO.name, SECRET)
        assert wrapped.startswith("vault:v1:")
        assert client(Role.data_scientist, "credit_scoring").unwrap(INFO.name, wrapped) == SECRET
        decrypted = [request for request in double.state.requests if "decrypt" in request]
        with pytest.raises(AccessDenied):
            client(Role.data_scientist, "marketing").unwrap(INFO.name, wrapped)
        assert [request for request in double.state.requests if "decrypt" in request] == decrypted
    assert set(double.state.transit) == {"falaj.features.income.personal"}


def test_broker_process_gets_the_same_choice(in_vault: PlatformConfig) -> None:
    """The overrides for the new process contain paths, never the value of a secret."""
    overrides = overrides_of("secrets", in_vault.secrets)
    parsed = chosen(Path(in_vault.storage.root), *overrides)
    assert parsed.secrets == in_vault.secrets
    assert "canary-secret-id" not in "".join(overrides)
    special = chosen(Path(in_vault.storage.root), *overrides, "secrets.vault.role='it\\'s = {odd}'")
    assert chosen(Path("/"), *overrides_of("secrets", special.secrets)).secrets == special.secrets


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "address is missing"),
        ([ADDRESS], "secret_file is missing.*AppRole's secret id"),
        ([ADDRESS, "secrets.vault.auth=jwt"], "secret_file is missing.*token"),
        ([ADDRESS, "secrets.vault.auth=ldap"], "auth"),
    ],
    ids=["nothing", "no secret id", "no token", "unknown"],
)
def test_incomplete_choice_names_the_missing_setting(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    """At the start, not at the first use of a key."""
    with pytest.raises(ConfigError, match=message):
        chosen(tmp_path, "secrets=vault", *overrides)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o620, 0o604])
def test_readable_or_missing_secret_file_is_refused(
    in_vault: PlatformConfig, secret_file: Path, double: VaultDouble, stopped: threading.Event, mode: int
) -> None:
    """Vault is not called."""
    secret_file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_store(in_vault, stopped=stopped)
    secret_file.unlink()
    with pytest.raises(Unauthenticated, match="cannot be read"):
        open_store(in_vault, stopped=stopped)
    assert double.state.requests == []


def test_replaced_secret_restores_the_login_without_a_restart(
    in_vault: PlatformConfig,
    secret_file: Path,
    double: VaultDouble,
    stopped: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The old secret and token are withdrawn. The log reports it until the new secret is there."""
    monkeypatch.setattr(vault_session, "RELOGIN_S", 0.02)
    vault = in_vault.secrets.vault
    client = vault_session.connect_to_vault(vault)
    double.state.approles["falaj"] = "secret-of-tomorrow"
    double.state.tokens.clear()
    thread = threading.Thread(
        target=vault_session.stay_logged_in, args=(client, vault_session.vault_auth(vault), stopped)
    )
    thread.start()
    wait_until(lambda: "Keys become unusable" in caplog.text)
    assert "secret-" not in caplog.text
    secret_file.write_text("secret-of-tomorrow")
    wait_until(lambda: client.token in double.state.tokens)
    VaultKeyStore(client).ensure(INFO)
    stopped.set()
    thread.join()


def test_keyring_opens_with_the_passphrase_in_a_file(
    tmp_path: Path, secret_file: Path, stopped: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key file is written. A wrong passphrase, an open file and a missing file are refused."""
    quick = Derivation(salt=bytes(SALT_BYTES), n=2**14)
    monkeypatch.setattr(Derivation, "new", lambda: quick)
    override = f"secrets.passphrase_file={secret_file}"
    secret_file.write_text("correct horse battery\n")
    open_store(chosen(tmp_path, override), stopped=stopped).ensure(INFO)
    assert not (tmp_path / "keys" / "kek").exists()
    assert open_store(chosen(tmp_path, override), stopped=stopped).info(INFO.name) == INFO
    secret_file.write_text("another horse battery")
    with pytest.raises(KeyEncryptionKeyWrong):
        open_store(chosen(tmp_path, override), stopped=stopped)
    secret_file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_store(chosen(tmp_path, override), stopped=stopped)
    secret_file.unlink()
    with pytest.raises(ConfigError, match="passphrase_file"):
        open_store(chosen(tmp_path, override), stopped=stopped)
