"""What happens to the cluster, its keys and the ledger itself, and who was let in or not."""

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
class ProcessRestarted(LedgerEvent):
    """The supervisor started a part of the cluster again."""

    cluster_id: str
    process: str
    """As `cluster.status` names it; `Ray head` is all of Ray."""
    reason: str
    """What was seen of it: `dead`, `stopped` or `does not answer`."""
    attempt: int
    """How often it was tried since the part last ran for a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingRestored(LedgerEvent):
    """Applications that the ledger says serve were started again."""

    applications: list[str]
    failed: list[str]
    """Those that did not start; the command's output says why."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysRotated(LedgerEvent):
    view: str
    keys: dict[str, int]
    """Name to newest version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRelabelled(LedgerEvent):
    """A key is about to be described otherwise: class, purposes, region."""

    name: str
    was: dict[str, Json]
    becomes: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRevocation(LedgerEvent):
    """A key is about to be destroyed, with all that is under it."""

    name: str
    described: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEncryptionKeyRotated(LedgerEvent):
    """The keyring is under another key-encryption key."""

    num_keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessDecided(LedgerEvent):
    """The event's actor was denied something, or permitted it and is of the sample."""

    allowed: bool
    role: str
    purpose: str
    tenant: str
    entrypoint: str
    """Of the job that asked; empty where no job did."""
    action: str
    kind: str
    resource: str
    column_class: str
    policies: list[str]
    """Those that decided; empty where none permitted it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangersRefused(LedgerEvent):
    """Requests without a valid identity within one window, for one reason."""

    reason: str
    count: int
    first_at: float
    """Unix seconds."""
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DenialsCounted(LedgerEvent):
    """The event's actor was denied something more often than is worth an event each."""

    tenant: str
    action: str
    count: int
    """Beside those that are `AccessDecided`."""
    first_at: float
    """Unix seconds."""
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeLimitSet(LedgerEvent):
    """How much a principal or a tenant may ask of the edges; without either number it is the edges' default again."""

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
