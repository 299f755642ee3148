"""Events of the cluster, its keys, access decisions and the ledger itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStarted(LedgerEvent):
    cluster_id: str
    region: str
    num_cpus: int
    num_gpus: int
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStopped(LedgerEvent):
    cluster_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeJoined(LedgerEvent):
    """The head admitted another machine to the cluster, and signed its certificate."""

    cluster_id: str
    node_id: str
    name: str
    """Host name of the machine."""
    address: str
    region: str
    num_cpus: int
    num_gpus: int
    certificate: str
    """SHA-256 of the node's certificate (DER), in hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCertificateRenewed(LedgerEvent):
    """The head or a node has a new certificate, before the old one expired."""

    cluster_id: str
    node_id: str
    """Id of the node; `head` is the head."""
    certificate: str
    """SHA-256 of the new certificate (DER), in hex."""
    expires_at: str
    """ISO 8601, UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLeft(LedgerEvent):
    """A node ended, or was declared dead. Its certificate gives it no keys any more."""

    cluster_id: str
    node_id: str
    reason: str
    """`left` after a drain, `down` without one, `failed` if it did not start, `replaced` by a node at the same address,
    `removed` by an operator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessRestarted(LedgerEvent):
    """The supervisor restarted or resumed a part of the cluster."""

    cluster_id: str
    process: str
    """Name of the part, as in `cluster.status`; `Ray head` is all of Ray. `… of node <id>` follows if it is not on the
    head."""
    reason: str
    """State of the part that caused the restart: `dead`, `stopped` or `does not answer`."""
    attempt: int
    """Number of attempts since the part last ran for a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingRestored(LedgerEvent):
    """The applications that should serve according to the ledger were started again."""

    applications: list[str]
    failed: list[str]
    """Applications that did not start. The output of `serve_apps.deploy` has the reasons."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysRotated(LedgerEvent):
    view: str
    keys: dict[str, int]
    """Maps key name to newest version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRelabelled(LedgerEvent):
    """A key's description (class, purposes, region) is about to change."""

    name: str
    was: dict[str, Json]
    becomes: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRevocation(LedgerEvent):
    """A key is about to be destroyed. All data that it encrypts becomes unreadable."""

    name: str
    described: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEncryptionKeyRotated(LedgerEvent):
    """The keyring is now encrypted with a new key-encryption key."""

    num_keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessDecided(LedgerEvent):
    """A request of the event's actor was denied, or it was permitted and is part of the logged sample."""

    allowed: bool
    role: str
    purpose: str
    tenant: str
    entrypoint: str
    """Entry point of the job that made the request; empty if no job made it."""
    action: str
    kind: str
    resource: str
    column_class: str
    policies: list[str]
    """Policies that decided; empty if no policy permitted the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangersRefused(LedgerEvent):
    """Unauthenticated requests that were refused for one reason within one period.

    Elsewhere they are called unauthenticated. The name of the event stays, because ledgers have it.
    """

    reason: str
    count: int
    first_at: float
    """Unix seconds."""
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DenialsCounted(LedgerEvent):
    """Further denials of the event's actor, counted to limit the number of events."""

    tenant: str
    action: str
    count: int
    """Number of denials, without those that have an `AccessDecided` event."""
    first_at: float
    """Unix seconds."""
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeLimitSet(LedgerEvent):
    """The edge limits of a principal or a tenant changed. If both numbers are null, the edge's defaults apply again."""

    limited: str
    """`principal` or `tenant`."""
    name: str
    requests_per_s: int | None
    concurrent: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSigned(LedgerEvent):
    upto_seq: int
    upto_hash: str
    key_id: str
    signature: str
    """Ed25519 over `<upto_seq>:<upto_hash>`, base64."""
