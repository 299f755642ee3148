"""Checks of a machine that the head has admitted, before parts of the cluster start on it."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import sqlalchemy as sa

from cluster.errors import ConfigError, FalajError, first_line
from cluster.host.gcs import REDIS_PORT
from cluster.host.names import is_loopback_host
from cluster.ledger import open_ledger
from cluster.membership.admission import proof_path
from cluster.membership.members import current_members
from cluster.security.keys.vault_session import connect_to_vault
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig, SecretsKind
from cluster.storage import exists, file_system

CONNECT_S = 5.0
MAX_CLOCK_S = 30


def check_clock(ahead_s: float) -> None:
    """Require that this machine's clock agrees with the head's. Tokens and the ages of records depend on it.

    Raises:
        ConfigError: they differ by more than `MAX_CLOCK_S`.
    """
    if abs(ahead_s) > MAX_CLOCK_S:
        direction = "ahead of" if ahead_s > 0 else "behind"
        raise ConfigError(
            f"This machine's clock is {abs(ahead_s):.0f} s {direction} the head's; at most {MAX_CLOCK_S} s are "
            "allowed. Set the clocks of both with NTP, then join again."
        )


def check_shared_state(config: PlatformConfig, record: ClusterRecord) -> None:
    """Require that this machine reaches the same ledger, storage root and online store as the head.

    Raises:
        ConfigError: one of them is not reachable, or is another one.
    """
    try:
        members = current_members(open_ledger(config), record.cluster_id)
    except sa.exc.SQLAlchemyError as error:
        cause = first_line(error.__cause__ or error)
        raise ConfigError(
            f"The ledger {config.ledger.url} cannot be used from this machine: {cause}."
        ) from None
    if record.node_id not in members:
        raise ConfigError(
            f"The ledger {config.ledger.url} is another database here than on the head: it lacks this node's event."
        )
    proof = proof_path(record, str(record.node_id))
    try:
        is_same = exists(proof)
        if is_same:
            fs, path = file_system(proof)
            fs.rm_file(path)
    except Exception as error:  # noqa: BLE001 (each file system has its own errors)
        raise ConfigError(
            f"storage.root {record.storage_root} cannot be read here: {first_line(error)}."
        ) from None
    if not is_same:
        raise ConfigError(
            f"storage.root {record.storage_root} is another place here than on the head: a file that the head wrote "
            "there is missing. Every node needs the same store, with the same endpoint and credentials."
        )
    online = urlsplit(config.online.url)
    try:
        socket.create_connection((online.hostname or "", online.port or REDIS_PORT), CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"The online store {config.online.url} does not answer this machine ({error.strerror or error})."
        ) from None


def check_own_vault(config: PlatformConfig) -> None:
    """Require that the cluster's keys are in Vault, and that this machine's login works.

    Raises:
        ConfigError: the keys are elsewhere, or this machine cannot reach Vault or log in.
    """
    vault = config.secrets.vault
    if config.secrets.kind is not SecretsKind.vault:
        raise ConfigError(
            f"vault=true needs a cluster with secrets=vault; this one has {config.secrets.kind.value}. Leave it out: "
            "then the node gets keys from the head."
        )
    if is_loopback_host(urlsplit(vault.address).hostname or ""):
        raise ConfigError(
            f"The head's secrets.vault.address {vault.address} is loopback, which is another machine here. Start the "
            "cluster with an address that every node reaches, or leave out vault=true."
        )
    try:
        connect_to_vault(vault)
    except FalajError as error:
        raise ConfigError(f"{error} The settings of this node's login are secrets.vault.….") from None
