"""Which key store the broker opens, and that the policies stand before either; Vault is the double, not Vault."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from cluster import up
from cluster.errors import AccessDenied, ConfigError, Unauthenticated
from cluster.node.launch import overrides as overrides_of
from cluster.security.authorization.policy import Decision, Policy, Resource
from cluster.security.keys import configured
from cluster.security.keys.__main__ import ACTIONS
from cluster.security.keys.broker import Broker
from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.configured import open_store
from cluster.security.keys.gate import Gate, Operation
from cluster.security.keys.kek import SALT_BYTES, Derivation
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyEncryptionKeyWrong, KeyInfo
from cluster.security.keys.vault import VaultKeyStore
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.principal import Principal, TokenVerifier
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig, load
from cluster.storage import Layout
from tests.vault_double import VaultDouble

INFO = KeyInfo(name="features/income/personal", column_class="personal", purposes=("credit_scoring",))
SECRET = b"a data key of thirty-two bytes.."


def chosen(root: Path, *overrides: str) -> PlatformConfig:
    """The configuration of these words of a command line."""
    composed = _composed(*overrides).copy()
    composed.storage.root = str(root)
    return load(composed, PlatformConfig)


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_module("configs", version_base=None):
        composed = compose("cluster", overrides=list(overrides))
    return OmegaConf.masked_copy(composed, list(PlatformConfig.__dataclass_fields__))


@pytest.fixture
def double() -> Iterator[VaultDouble]:
    """A double that lets one AppRole in."""
    with VaultDouble() as double:
        double.state.approles["falaj"] = "secret-of-now"
        yield double


@pytest.fixture
def stopped() -> Iterator[threading.Event]:
    """Ends what keeps a login alive."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """AppRole's secret id."""
    path = tmp_path / "secret-id"
    path.touch(mode=0o600)
    path.write_text("secret-of-now\n")
    return path


@pytest.fixture
def in_vault(tmp_path: Path, double: VaultDouble, secret_file: Path) -> PlatformConfig:
    """An installation that keeps its keys in Vault."""
    config = chosen(
        tmp_path,
        "secrets=vault",
        "tier=enterprise_gpu",
        "secrets.vault.address=http://127.0.0.1:8200",
        "secrets.vault.secret_file=/run/secret",
    )
    config.secrets.vault.address, config.secrets.vault.secret_file = double.address, str(secret_file)
    return config


@contextlib.contextmanager
def serving(config: PlatformConfig, stopped: threading.Event) -> Iterator[tuple[Path, Layout]]:
    """A broker over the configured store, with the real policies and the dev issuer's tokens."""
    folder = Path(tempfile.mkdtemp(prefix="fk-"))
    places, policy = Layout(str(folder / "root")), Policy.load()
    ensure_issuer(places)

    def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
        return policy.decide(principal, ACTIONS[operation], Resource.of_key(info))

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
        until((folder / "run" / "broker.sock").exists)
        yield folder / "run" / "broker.sock", places
    finally:
        stopped.set()
        thread.join()
        shutil.rmtree(folder)


def until(holds: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + 10, threading.Event()
    while not holds():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_a_production_tier_refuses_the_keyring_unless_it_is_acknowledged(
    tmp_path: Path, stopped: threading.Event
) -> None:
    """Before anything is started, and again when the broker would open it."""
    config = chosen(tmp_path, "tier=enterprise_gpu")
    for open_it in (lambda: up.check(config), lambda: open_store(config, stopped=stopped)):
        with pytest.raises(ConfigError, match=r"secrets=vault, or secrets\.acknowledge_keyring=true"):
            open_it()
    assert not (tmp_path / "keys").exists()
    known = chosen(tmp_path, "tier=enterprise_gpu", "secrets.acknowledge_keyring=true")
    assert isinstance(open_store(known, stopped=stopped), Keyring)


def test_a_small_installation_has_a_keyring_without_being_asked(
    tmp_path: Path, stopped: threading.Event
) -> None:
    """Two commands on a fresh machine must do."""
    assert isinstance(open_store(chosen(tmp_path), stopped=stopped), Keyring)


def test_before_vault_the_broker_asks_the_policies(
    in_vault: PlatformConfig, double: VaultDouble, stopped: threading.Event
) -> None:
    """Whose purpose is not the key's never reaches Vault, and nobody but the broker has a token for it."""
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


def test_the_brokers_process_is_told_the_same_choice(in_vault: PlatformConfig) -> None:
    """What `cluster.up` was given reaches the process that it starts, by paths and never a secret's value."""
    words = overrides_of("secrets", in_vault.secrets)
    again = chosen(Path(in_vault.storage.root), *words)
    assert again.secrets == in_vault.secrets
    assert "secret-of-now" not in "".join(words)
    odd = chosen(Path(in_vault.storage.root), *words, "secrets.vault.role='it\\'s = {odd}'")
    assert chosen(Path("/"), *overrides_of("secrets", odd.secrets)).secrets == odd.secrets


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "address is missing"),
        (["secrets.vault.address=https://vault:8200"], "secret_file is missing.*AppRole's secret id"),
        (
            ["secrets.vault.address=https://vault:8200", "secrets.vault.auth=jwt"],
            "secret_file is missing.*token",
        ),
        (["secrets.vault.address=https://vault:8200", "secrets.vault.auth=ldap"], "auth"),
    ],
    ids=["nothing", "no secret id", "no token", "unknown"],
)
def test_an_incomplete_choice_says_what_is_missing(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    """At once, not when the first key is needed."""
    with pytest.raises(ConfigError, match=message):
        chosen(tmp_path, "secrets=vault", *overrides)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o620, 0o604])
def test_a_secret_that_others_can_read_is_not_used(
    in_vault: PlatformConfig, secret_file: Path, double: VaultDouble, stopped: threading.Event, mode: int
) -> None:
    """Nor one that is gone; Vault is not asked."""
    secret_file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_store(in_vault, stopped=stopped)
    secret_file.unlink()
    with pytest.raises(Unauthenticated, match="cannot be read"):
        open_store(in_vault, stopped=stopped)
    assert double.state.requests == []


def test_a_plain_address_elsewhere_is_refused(in_vault: PlatformConfig, stopped: threading.Event) -> None:
    """The login would be read on its way."""
    in_vault.secrets.vault.address = "http://vault.example:8200"
    with pytest.raises(ConfigError, match="https"):
        open_store(in_vault, stopped=stopped)


def test_a_replaced_secret_opens_vault_again_without_a_restart(
    in_vault: PlatformConfig,
    secret_file: Path,
    double: VaultDouble,
    stopped: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The old one was withdrawn and the token with it; the log says so until the new one is there."""
    monkeypatch.setattr(configured, "RETRY_S", 0.02)
    vault = in_vault.secrets.vault
    client = configured.connect_to_vault(vault)
    double.state.approles["falaj"] = "secret-of-tomorrow"
    double.state.tokens.clear()
    thread = threading.Thread(
        target=configured._stay_logged_in, args=(client, configured.vault_auth(vault), stopped)
    )
    thread.start()
    until(lambda: "Keys become unusable" in caplog.text)
    assert "secret-of" not in caplog.text
    secret_file.write_text("secret-of-tomorrow")
    until(lambda: client.token in double.state.tokens)
    VaultKeyStore(client).ensure(INFO)
    stopped.set()
    thread.join()


def test_a_keyring_is_opened_by_the_passphrase_in_a_file(
    tmp_path: Path, secret_file: Path, stopped: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key lies beside it; another passphrase, an open file, and a keyring that has none are refused."""
    quick = Derivation(salt=bytes(SALT_BYTES), n=2**14)
    monkeypatch.setattr(Derivation, "new", lambda: quick)
    named = f"secrets.passphrase_file={secret_file}"
    secret_file.write_text("correct horse battery\n")
    open_store(chosen(tmp_path, named), stopped=stopped).ensure(INFO)
    assert not (tmp_path / "keys" / "kek").exists()
    assert open_store(chosen(tmp_path, named), stopped=stopped).info(INFO.name) == INFO
    secret_file.write_text("another horse battery")
    with pytest.raises(KeyEncryptionKeyWrong):
        open_store(chosen(tmp_path, named), stopped=stopped)
    secret_file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_store(chosen(tmp_path, named), stopped=stopped)
    secret_file.unlink()
    with pytest.raises(ConfigError, match="passphrase_file"):
        open_store(chosen(tmp_path, named), stopped=stopped)
