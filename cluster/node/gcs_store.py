"""The state of Ray's GCS in Redis: its address for Ray, whether a cluster has state there, and its removal.

Ray stores all hashes of a cluster under its own prefix, so several clusters can share one Redis.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.errors import ConfigError
from cluster.host.gcs import GcsConfig
from cluster.host.names import is_loopback_host
from cluster.security.private_file import read_secret_file
from cluster.session import ClusterRecord
from cluster.storage import resolve

if TYPE_CHECKING:
    import redis

TIMEOUT_S = 5.0
USER_VARIABLE, PASSWORD_FILE_VARIABLE = "FALAJ_GCS_USER", "FALAJ_GCS_PASSWORD_FILE"
PASSWORD_VARIABLE = "FLAGS_redis_password"  # noqa: S105 (the name of a variable of the GCS)
"""The GCS reads its password from this variable. Every user of the machine can read command lines."""
_KEYS_AT_ONCE = 1000
SCAN_S = 30.0
"""Timeout in seconds of a search for the keys of a cluster."""


def password(gcs: GcsConfig) -> str:
    """Return the password of Redis; empty if none is configured.

    Raises:
        ConfigError: the file cannot be read, or other users can read it.
    """
    if gcs.password_file is None:
        return ""
    path = Path(resolve(gcs.password_file))
    try:
        return read_secret_file(path, what="the password of the GCS's Redis")
    except OSError as error:
        raise ConfigError(f"cluster.gcs.password_file={path} cannot be read: {error.strerror}.") from None


def ray_environment(gcs: GcsConfig, record: ClusterRecord) -> dict[str, str]:
    """Return the variables that `cluster.node.ray_start` and the GCS need. They contain no secret."""
    return {
        "RAY_REDIS_ADDRESS": gcs.address,
        "RAY_external_storage_namespace": record.cluster_id,
        **({"RAY_REDIS_CA_CERT": resolve(gcs.ca_file)} if gcs.ca_file else {}),
        **({USER_VARIABLE: gcs.user} if gcs.user else {}),
        **({PASSWORD_FILE_VARIABLE: resolve(gcs.password_file)} if gcs.password_file else {}),
    }


def secret_environment(gcs: GcsConfig) -> dict[str, str]:
    """Return the variable with the password, for the GCS's process only.

    Raises:
        ConfigError: the file cannot be read, or other users can read it.
    """
    secret = password(gcs)
    return {PASSWORD_VARIABLE: secret} if secret else {}


def require_redis(gcs: GcsConfig) -> None:
    """Require that Redis answers and accepts the password. Without `cluster.gcs.url` nothing is checked.

    A Redis on the network needs a password, because a client that can write the GCS's state can run code on every node.

    Raises:
        ConfigError: Redis does not answer, refuses the password, or is on the network without a password.
    """
    if gcs.url is not None:
        host = urlsplit(gcs.url).hostname or ""
        if gcs.password_file is None and not is_loopback_host(host):
            raise ConfigError(
                f"The GCS's Redis at {gcs.address} is on the network, where other machines could change the "
                "cluster's state. Give it a password, and set cluster.gcs.password_file."
            )
        with _connected(gcs) as client:
            client.ping()


def has_state(gcs: GcsConfig, record: ClusterRecord) -> bool:
    """Return whether Redis has the state of a cluster.

    Raises:
        ConfigError: Redis does not answer.
    """
    if gcs.url is None:
        return False
    with _connected(gcs) as client:
        return next(_keys(client, record), None) is not None


def remove_state(gcs: GcsConfig, record: ClusterRecord) -> None:
    """Remove the state of a cluster that has ended.

    Raises:
        ConfigError: Redis does not answer.
    """
    if gcs.url is None:
        return
    with _connected(gcs) as client:
        for key in _keys(client, record):
            client.unlink(key)


def remove_state_or_warn(gcs: GcsConfig, record: ClusterRecord) -> None:
    """Remove the state of a cluster that has ended. If Redis does not answer, print a warning: the state is unused."""
    try:
        remove_state(gcs, record)
    except ConfigError as error:
        print(f"warning: keys RAY{record.cluster_id}@* of Ray stay in Redis. {error}", file=sys.stderr)


def _keys(client: redis.Redis, record: ClusterRecord) -> Iterator[Any]:
    """Yield the keys of a cluster. Redis must scan all of its keys, so the search has a timeout."""
    deadline = time.monotonic() + SCAN_S
    cursor = None
    while cursor != 0:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"The GCS's Redis has so many other keys that those of cluster {record.cluster_id} were not found in "
                f"{SCAN_S:.0f} s. Give the GCS a Redis of its own."
            )
        cursor, keys = client.scan(cursor or 0, match=f"RAY{record.cluster_id}@*", count=_KEYS_AT_ONCE)
        yield from keys


@contextmanager
def _connected(gcs: GcsConfig) -> Iterator[redis.Redis]:
    # Imported here, because few clusters keep this state in Redis.
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    options: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    if gcs.ca_file is not None:
        options["ssl_ca_certs"] = resolve(gcs.ca_file)
    if secret := password(gcs):
        options["password"] = secret
    try:
        with redis.Redis.from_url(str(gcs.url), **options) as client:
            yield client
    except redis.AuthenticationError:
        raise ConfigError(
            f"The GCS's Redis at {gcs.address} refuses the user or the password. Check cluster.gcs.url and "
            "cluster.gcs.password_file."
        ) from None
    except redis.RedisError as error:
        raise ConfigError(
            f"The GCS's Redis at {gcs.address} cannot be used ({' '.join(str(error).split())[:200]}). Start it, or "
            "correct cluster.gcs.url."
        ) from None
