"""Errors and connections of the online store's engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cluster.errors import ConfigError, OnlineStoreUnavailable
from cluster.security.keys.keyring import Keyring
from cluster.security.tls.certificates import ensure_tls
from cluster.settings import OnlineConfig, OnlineKind, PlatformConfig
from cluster.settings_conversion import load
from cluster.storage import Layout
from feature_jobs.store.online.reader import open_online_store
from tests.projects.online import open_store
from tests.servers.ports import free_port
from tests.servers.redis_server import running_redis
from tests.unit.feature_jobs.online.test_store import KEY_TYPES, PERSONS, VIEW, amounts, row


def test_unavailable_redis_is_named(keys: Keyring) -> None:
    """The error has the address and the setting."""
    config = OnlineConfig(kind=OnlineKind.redis, url="redis://127.0.0.1:1/0")
    with pytest.raises(OnlineStoreUnavailable, match=r"redis://127\.0\.0\.1:1/0.*online\.url"):
        open_online_store(config, Layout(""), keys).get(VIEW, PERSONS)


def test_redis_connection_uses_tls_and_a_password_file(tmp_path: Path, keys: Keyring) -> None:
    """The certificate is checked with the given authority. Without the password the read fails."""
    places = Layout(str(tmp_path))
    ensure_tls(places)
    (tmp_path / "password").write_text("s3cret\n")
    port, files = free_port(), {"cert": "node.pem", "key": "node.key", "ca-cert": "ca.pem"}
    options = [
        word for name, file in files.items() for word in (f"--tls-{name}-file", f"{places.tls}/{file}")
    ]
    tls = ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "s3cret"]
    config = OnlineConfig(
        kind=OnlineKind.redis,
        url=f"rediss://127.0.0.1:{port}/0",
        ca_file=f"{places.tls}/ca.pem",
        password_file=str(tmp_path / "password"),
    )
    with running_redis(*options, *tls):
        store = open_online_store(config, places, keys)
        assert store.put(VIEW, KEY_TYPES, [row(1, 1, 1.0)]) == 1
        assert amounts(store) == [1.0, None, None]
        store.close()
        for missing in ({"ca_file": None}, {"password_file": None}):
            store = open_online_store(dataclasses.replace(config, **missing), places, keys)  # type: ignore[arg-type]
            with pytest.raises(OnlineStoreUnavailable):
                store.get(VIEW, PERSONS)
            store.close()


def test_full_store_names_the_setting_to_raise(tmp_path: Path, keys: Keyring) -> None:
    """The old rows stay."""
    small = open_store(tmp_path, keys, OnlineConfig(map_size_gib=0.0002))
    small.put(VIEW, KEY_TYPES, [row(1, 1, 1.0)])
    with pytest.raises(OnlineStoreUnavailable, match="map_size_gib"):
        small.put(VIEW, KEY_TYPES, [row(key, 2, 2.0) for key in range(5000)])
    assert amounts(small) == [1.0, None, None]
    small.close()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("http://x", "redis://"),
        ("redis://:secret@x:6379", "password_file"),
        ("redis://u:pw@x", "password_file"),
    ],
)
def test_invalid_redis_url_is_refused(setting: str, words: str) -> None:
    """A password in the URL would be in every printed configuration."""
    with pytest.raises(ConfigError, match=words) as refused:
        load(OmegaConf.create({"online": {"kind": "redis", "url": setting}}), PlatformConfig)
    assert "secret" not in str(refused.value)
