"""Hydra composes, these dataclasses validate, and the code sees nothing but them.

Every job's configuration inherits `PlatformConfig`, so a tier can set the platform's sections once for all jobs.
OmegaConf cannot hold frozen dataclasses or `Literal`, hence mutable slots and enums.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.errors import ConfigError
from cluster.features_config import FeaturesConfig as FeaturesConfig

T = TypeVar("T")
_ISSUER_WORD = re.compile(r"[A-Za-z0-9._~:/?@+,=%-]{1,200}")
_CLAIM = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Tier(enum.Enum):
    """The size of the installation the defaults are for."""

    smb_cpu = "smb_cpu"
    enterprise_gpu = "enterprise_gpu"


class OnlineKind(enum.Enum):
    """The engine of the online store."""

    lmdb = "lmdb"
    """On one machine."""
    redis = "redis"
    """For many."""


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """Where all state lies."""

    root: str = ".falaj"
    """Any fsspec URI, or a path relative to the project root."""


@dataclass(kw_only=True, slots=True)
class LedgerConfig:
    """The event ledger."""

    url: str | None = None
    """SQLAlchemy URL; none means SQLite at `<storage.root>/ledger.db`. A password stands in a file, never here."""
    checkpoint_every: int = 50
    """Events between two signed checkpoints."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"ledger.checkpoint_every must be at least 1, got {self.checkpoint_every}.")
        parts = urlsplit(self.url or "")
        if parts.password or "password" in parse_qs(parts.query):
            raise ValueError(
                "ledger.url holds a password, which command lines and dashboards would show. Put it in a file of "
                "PostgreSQL's own kind (~/.pgpass, 0600), or name one with ?passfile=/path in the URL."
            )


@dataclass(kw_only=True, slots=True)
class OnlineConfig:
    """The online store."""

    kind: OnlineKind = OnlineKind.lmdb
    map_size_gib: float = 4.0
    """Upper bound of what is put into LMDB after materialisations, whose own rows lie beside it; the file is sparse."""
    url: str = "redis://127.0.0.1:6379/0"
    """Of Redis; `rediss://` is TLS. A password stands in a file, never here."""
    password_file: str | None = None
    ca_file: str | None = None
    """Certificate authority of Redis' address; none takes the system's."""
    prefix: str = "falaj"
    """In front of every key in Redis, so that one can serve several installations."""

    def __post_init__(self) -> None:
        if not 0 < self.map_size_gib <= 65_536:
            raise ValueError(f"online.map_size_gib must be above 0, at most 65536, got {self.map_size_gib}.")
        parts = urlsplit(self.url)
        if parts.scheme not in ("redis", "rediss"):
            raise ValueError("online.url must begin with redis:// or rediss://.")
        if parts.password:
            raise ValueError(
                "online.url holds a password. Put it in a file of your own and name it in online.password_file."
            )
        if "{" in self.prefix or "}" in self.prefix:
            raise ValueError(f"online.prefix must be without braces, got '{self.prefix}'.")


class SecretsKind(enum.Enum):
    """Where key-encryption keys are kept."""

    keyring = "keyring"
    vault = "vault"


class VaultAuth(enum.Enum):
    """How the key broker logs in to Vault."""

    approle = "approle"
    jwt = "jwt"
    kubernetes = "kubernetes"


@dataclass(kw_only=True, slots=True)
class VaultConfig:
    """HashiCorp Vault; secrets are given as files, never here."""

    address: str = ""
    """`https://host:port`; plain http on loopback alone."""
    auth: VaultAuth = VaultAuth.approle
    role: str = "falaj"
    """AppRole's role id; the name of the role for `jwt` and `kubernetes`."""
    secret_file: str | None = None
    """AppRole's secret id or the token for `jwt`, read at each login; none takes a pod's own token for `kubernetes`."""
    auth_mount: str | None = None
    """None takes the way to log in by its own name."""
    transit_mount: str = "transit"
    kv_mount: str = "secret"
    prefix: str = "falaj"
    """In front of every key's name, so that one Vault can serve several installations."""
    ca_file: str | None = None
    """Certificate authority of its address; none takes the system's."""
    namespace: str | None = None
    """Of Vault Enterprise."""
    pki_role: str | None = None
    """Role of its PKI that issues the edge's and the nodes' certificates; none leaves that to the local authority."""
    pki_mount: str = "pki"
    pki_ttl_s: int = 30 * 86_400


@dataclass(kw_only=True, slots=True)
class SecretsConfig:
    """The key store that the key broker opens."""

    kind: SecretsKind = SecretsKind.keyring
    acknowledge_keyring: bool = False
    """Lets a production tier keep its keys in the keyring of one machine."""
    passphrase_file: str | None = None
    """A file with the keyring's passphrase, read when the broker starts: for a folder in memory, say. None keeps a
    random key in a file beside the keyring."""
    vault: VaultConfig = field(default_factory=VaultConfig)

    def __post_init__(self) -> None:
        if self.kind is not SecretsKind.vault:
            return
        if not self.vault.address:
            raise ValueError("secrets.vault.address is missing. Give it as https://host:port.")
        if self.vault.secret_file is None and self.vault.auth is not VaultAuth.kubernetes:
            what = (
                "AppRole's secret id" if self.vault.auth is VaultAuth.approle else "the token to log in with"
            )
            raise ValueError(f"secrets.vault.secret_file is missing. Give the path of a file with {what}.")


@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class IssuerConfig:
    """An OIDC issuer, whose tokens are believed instead of the dev issuer's of this machine."""

    url: str | None = None
    """As its tokens name it (`iss`); none is the dev issuer."""
    audience: str = "falaj"
    jwks_url: str | None = None
    """Where its keys are; none asks its OpenID configuration."""
    ca_file: str | None = None
    """Certificate authority of its address; none takes the system's."""
    role_claim: str = "role"
    purpose_claim: str = "purpose"
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"
    """Where its `model:<name>` words say which models may be asked; without any, the role alone decides."""

    def __post_init__(self) -> None:
        for name in ("url", "audience"):
            value = getattr(self, name)
            if value is not None and not _ISSUER_WORD.fullmatch(value):
                raise ValueError(
                    f"identity.issuer.{name} must be one word of letters, digits and ._~:/?@+,=%-, because it stands "
                    f"in the edge's configuration, got '{value}'."
                )
        for name in ("role_claim", "purpose_claim", "tenant_claim", "scope_claim"):
            if not _CLAIM.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"identity.issuer.{name} must be letters, digits and '_', because the edge reads it as a path, "
                    f"got '{getattr(self, name)}'. Have the issuer map the claim to such a name."
                )


@dataclass(kw_only=True, slots=True)
class IdentityConfig:
    """As whom a job acts, and who says so."""

    issuer: IssuerConfig = field(default_factory=IssuerConfig)
    service_token_file: str | None = None
    """A file with the replicas' token, kept fresh by somebody; none lets the dev issuer mint it."""
    supervisor_token_file: str | None = None
    """A file with the supervisor's intent for `serve_apps.deploy`, kept fresh by somebody; none lets the dev issuer
    mint it. With another issuer and without this file, a lost head comes back without its applications."""

    token_file: str | None = None
    """A file with an intent, or an access token to take one from; or `vault:<path>#<field>`, a secret in KV. None lets
    the dev issuer give the user one."""
    role: str = "admin"
    """Of a token that is minted here."""
    purpose: str = ""
    """Of a token that is minted here."""
    environment: str = "local"
    """What the policies call this installation: `local`, `test`, `staging`, or else it counts as production."""


@dataclass(kw_only=True, slots=True)
class PortsConfig:
    """TCP ports of a local cluster, all on loopback but Ray's own."""

    gcs: int = 6379
    ray_client: int = 10001
    dashboard: int = 8265
    serve_http: int = 8000
    replicas: int = 30000
    """First of 1,000 ports from which Serve's replicas take theirs."""
    edge: int = 8443
    edge_metrics: int = 8404
    ray_metrics: int = 8080
    supervisor_metrics: int = 8405
    broker_metrics: int = 8406
    edge_controller_metrics: int = 8407


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """A Ray head node."""

    num_cpus: int = 8
    """Logical CPUs; more than there are, where waiting dominates."""
    num_gpus: int = 0
    region: str = "local"
    """Value of the node label `ray.io/availability-region`."""
    tls: bool = True
    """Whether Ray's processes speak TLS with each other and with drivers, both sides showing a certificate."""
    spill_folder: str | None = None
    """Where Ray puts objects when memory is short; none is its temporary folder."""
    object_store_mib: int = 1024
    ports: PortsConfig = field(default_factory=PortsConfig)

    def __post_init__(self) -> None:
        if self.num_cpus < 1:
            raise ValueError(f"cluster.num_cpus must be at least 1, got {self.num_cpus}.")
        if self.object_store_mib < 128:
            raise ValueError(f"cluster.object_store_mib must be at least 128, got {self.object_store_mib}.")


@dataclass(kw_only=True, slots=True)
class ScalingConfig:
    """Workers of a distributed training run."""

    num_workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"scaling.num_workers must be at least 1, got {self.num_workers}.")


class Durability(enum.Enum):
    """What an answer of a replica says of its record."""

    process = "process"
    """It survives the replica's end, kill -9 too."""
    disk = "disk"
    """It survives the machine's."""


@dataclass(kw_only=True, slots=True)
class BatchingConfig:
    """Requests that are at a replica at the same time are answered by one call, where a model gains by it."""

    max_rows: int = 64
    """Of a call; 1 answers each request by itself."""
    max_wait_ms: float = 0.0
    """How long a request may be held for others to come; 0 joins only what is there already."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"replica.batching.max_rows must be at least 1, got {self.max_rows}.")
        if not 0 <= self.max_wait_ms <= 1000:
            raise ValueError(
                f"replica.batching.max_wait_ms must lie between 0 and 1000, got {self.max_wait_ms}."
            )


@dataclass(kw_only=True, slots=True)
class ReplicaConfig:
    """Replicas of one served model version: a fixed number of them, or as many as the requests want."""

    num_replicas: int | None = None
    """A fixed number; none scales between `min_replicas` and `max_replicas`."""
    min_replicas: int = 0
    """0 lets an idle version go; its next request waits until a replica has started."""
    max_replicas: int = 2
    target_ongoing_requests: float = 24.0
    """Requests at once that one replica should have, those that wait for it included."""
    upscale_delay_s: float = 30.0
    """How long there must have been too many."""
    downscale_delay_s: float = 300.0
    """How long there must have been too few, while one replica stays."""
    downscale_to_zero_delay_s: float = 1800.0
    """How long there must have been none before the last replica goes."""
    look_back_s: float = 30.0
    """What is counted is a mean over this time; replicas report every other second."""
    num_cpus: float = 0.1
    """Logical CPUs a replica reserves."""
    num_gpus: float = 0.0
    """Fraction of a GPU; logical, without memory isolation."""
    max_ongoing_requests: int = 64
    """What a replica has in hand at once; more wait before it."""
    durability: Durability = Durability.process
    """Of predictions and outcomes, before they are answered."""
    batching: BatchingConfig = field(default_factory=BatchingConfig)

    def __post_init__(self) -> None:
        if self.num_replicas is not None and self.num_replicas < 1:
            raise ValueError(
                f"replica.num_replicas must be at least 1, or null to scale, got {self.num_replicas}."
            )
        if self.max_replicas < max(1, self.min_replicas) or self.min_replicas < 0:
            raise ValueError(
                f"replica.min_replicas and max_replicas must be 0 <= min <= max and 1 <= max, got "
                f"{self.min_replicas} and {self.max_replicas}."
            )
        if not 0 < self.target_ongoing_requests <= self.max_ongoing_requests:
            raise ValueError(
                f"replica.target_ongoing_requests must be above 0 and at most max_ongoing_requests "
                f"({self.max_ongoing_requests}), got {self.target_ongoing_requests}."
            )
        for name in ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"replica.{name} must not be negative, got {getattr(self, name)}.")
        if self.look_back_s < 3:
            raise ValueError(f"replica.look_back_s must be at least 3, got {self.look_back_s}.")


@dataclass(kw_only=True, slots=True)
class PlatformConfig:
    """The sections every job shares; `configs/platform.yaml` and `configs/tier/` fill them."""

    tier: Tier = Tier.smb_cpu
    storage: StorageConfig = field(default_factory=StorageConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    identity: IdentityConfig = field(default_factory=IdentityConfig)
    secrets: SecretsConfig = field(default_factory=SecretsConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)


def load(config: DictConfig, schema: type[T]) -> T:
    """Validate a composed configuration into its dataclass.

    Raises:
        ConfigError: an unknown key, a missing mandatory value, a wrong type or a value out of range.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_describe(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def to_plain(config: PlatformConfig) -> dict[str, Any]:
    """The platform's sections of a configuration as plain values that can cross a process boundary."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    names = {each.name for each in fields(PlatformConfig)}
    return {key: value for key, value in cast(dict[str, Any], values).items() if key in names}


def from_plain(values: dict[str, Any]) -> PlatformConfig:
    """The configuration that `to_plain` was given."""
    return load(OmegaConf.create(values), PlatformConfig)


def _describe(error: OmegaConfBaseException) -> str:
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    key = f"'{error.full_key}': " if error.full_key else ""
    if reason.startswith("Structured config of type") or "Missing mandatory value" in reason:
        return f"Configuration {key}a value is needed; give it as `{error.full_key}=…`."
    return f"Configuration {key}{reason}. See `--cfg job` for what is set."
