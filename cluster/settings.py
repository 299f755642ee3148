"""Configuration of the platform. Hydra composes it, these dataclasses validate it, and the code sees only them.

Every job's configuration inherits `PlatformConfig`, so a tier sets the platform's sections once for all jobs. The
dataclasses are not frozen and use enums, because OmegaConf supports neither frozen dataclasses nor `Literal`.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from cluster.host.gcs import GcsConfig
from cluster.host.names import require_edge_names, require_redis_url
from cluster.host.submission import SubmissionConfig
from cluster.host.this_node import LOOPBACK_ADDRESS, is_loopback
from cluster.placement import PlacementConfig, ScalingConfig

_ISSUER_WORD = re.compile(r"[A-Za-z0-9._~:/?@+,=%-]{1,200}")
_CLAIM = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_AHEAD_S = 31 * 86_400


class Tier(enum.Enum):
    """Size of an installation. It selects the defaults."""

    smb_cpu = "smb_cpu"
    enterprise_gpu = "enterprise_gpu"


class OnlineKind(enum.Enum):
    """The engine of the online store."""

    lmdb = "lmdb"  # for one machine
    redis = "redis"  # for several machines


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """Location of all state."""

    root: str = ".falaj"
    """fsspec URI, or a path relative to the project root."""
    local: str | None = None
    """Folder on this machine's disk, for what never leaves it. Null means `root`, or `.falaj` if `root` is remote."""
    upload_after_s: float = 60.0
    """Age in seconds after which a segment of a log is closed, so that it can be uploaded. Used if `root` is remote."""

    def __post_init__(self) -> None:
        if not 1 <= self.upload_after_s <= 3600:
            raise ValueError(f"storage.upload_after_s must be between 1 and 3600, got {self.upload_after_s}.")


@dataclass(kw_only=True, slots=True)
class LedgerConfig:
    """Configuration of the event ledger."""

    url: str | None = None
    """SQLAlchemy URL; null is SQLite at `<storage.root>/ledger.db`. Keep a password in a file, never in the URL."""
    checkpoint_every: int = 50
    """Number of events from one signed checkpoint to the next."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"ledger.checkpoint_every must be at least 1, got {self.checkpoint_every}.")
        parts = urlsplit(self.url or "")
        if parts.password or "password" in parse_qs(parts.query):
            raise ValueError(
                "ledger.url holds a password, which command lines and dashboards would show. Put it in a PostgreSQL "
                "password file (~/.pgpass, mode 0600), or name such a file with ?passfile=/path in the URL."
            )


@dataclass(kw_only=True, slots=True)
class OnlineConfig:
    """Configuration of the online store."""

    kind: OnlineKind = OnlineKind.lmdb
    map_size_gib: float = 4.0
    """Largest size in GiB of the LMDB file, which contains the rows that were put after a materialisation. Materialised
    rows are in other files. The LMDB file is sparse."""
    url: str = "redis://127.0.0.1:6379/0"
    """URL of Redis; `rediss://` means TLS. Put a password into `password_file`, never into the URL."""
    password_file: str | None = None
    ca_file: str | None = None
    """File with the certificate authority of the Redis server; null is the system's authorities."""
    prefix: str = "falaj"
    """Prefix of every key in Redis, so that several installations can share one Redis."""

    def __post_init__(self) -> None:
        if not 0 < self.map_size_gib <= 65_536:
            raise ValueError(f"online.map_size_gib must be above 0, at most 65536, got {self.map_size_gib}.")
        require_redis_url("online", self.url)
        if "{" in self.prefix or "}" in self.prefix:
            raise ValueError(f"online.prefix must be without braces, got '{self.prefix}'.")


@dataclass(kw_only=True, slots=True)
class FeaturesConfig:
    """Settings for the rows of all feature views."""

    max_ahead_s: float = 60.0
    """How far a row's times may be in the future, in seconds, when the row is pushed, streamed or ingested."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_ahead_s <= MAX_AHEAD_S:
            raise ValueError(
                f"features.max_ahead_s must be between 0 and {MAX_AHEAD_S}, got {self.max_ahead_s}."
            )


class SecretsKind(enum.Enum):
    """Store of the key-encryption keys."""

    keyring = "keyring"
    vault = "vault"


class VaultAuth(enum.Enum):
    """How the key broker logs in to Vault."""

    approle = "approle"
    jwt = "jwt"
    kubernetes = "kubernetes"


@dataclass(kw_only=True, slots=True)
class VaultConfig:
    """Configuration of HashiCorp Vault. Secrets are in files, never in the configuration."""

    address: str = ""
    """`https://host:port`; plain http is allowed on loopback only."""
    auth: VaultAuth = VaultAuth.approle
    role: str = "falaj"
    """Role id for `approle`; name of the role for `jwt` and `kubernetes`."""
    secret_file: str | None = None
    """File with the secret id for `approle` or the token for `jwt`. It is read at each login. For `kubernetes`, null
    means the pod's own token."""
    auth_mount: str | None = None
    """Mount path of the auth method; null is the method's name."""
    transit_mount: str = "transit"
    kv_mount: str = "secret"
    prefix: str = "falaj"
    """Prefix of every key's name, so that several installations can share one Vault."""
    ca_file: str | None = None
    """File with the certificate authority of the Vault server; null is the system's authorities."""
    namespace: str | None = None
    """Namespace, for Vault Enterprise."""
    pki_role: str | None = None
    """PKI role that issues the certificates of the edge and the nodes; with null, the local authority issues them."""
    pki_mount: str = "pki"
    pki_ttl_s: int = 30 * 86_400
    """Lifetime in seconds of certificates from Vault's PKI."""


@dataclass(kw_only=True, slots=True)
class SecretsConfig:
    """Configuration of the key store that the key broker uses."""

    kind: SecretsKind = SecretsKind.keyring
    acknowledge_keyring: bool = False
    """Allows a production tier to store its keys in the keyring of one machine."""
    passphrase_file: str | None = None
    """File with the keyring's passphrase. It is read when the broker starts, and can be in a folder in memory. With
    null, a random key is stored in a file next to the keyring."""
    vault: VaultConfig = field(default_factory=VaultConfig)

    def __post_init__(self) -> None:
        if self.kind is not SecretsKind.vault:
            return
        if not self.vault.address:
            raise ValueError("secrets.vault.address is missing. Give it as https://host:port.")
        if self.vault.secret_file is None and self.vault.auth is not VaultAuth.kubernetes:
            secret = "AppRole's secret id" if self.vault.auth is VaultAuth.approle else "the login token"
            raise ValueError(f"secrets.vault.secret_file is missing. Give the path of a file with {secret}.")


@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class IssuerConfig:
    """An OIDC issuer whose tokens are accepted, in place of this machine's development issuer."""

    url: str | None = None
    """The issuer's name, as in the claim `iss` of its tokens; null is the development issuer."""
    audience: str = "falaj"
    jwks_url: str | None = None
    """URL of the issuer's keys; null takes it from the issuer's OpenID configuration."""
    ca_file: str | None = None
    """File with the certificate authority of the issuer's server; null is the system's authorities."""
    role_claim: str = "role"
    purpose_claim: str = "purpose"
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"
    """Claim with scopes. Scopes `model:<name>` list the models that the principal may use. Without such a scope, only
    the role decides."""

    def __post_init__(self) -> None:
        for name in ("url", "audience"):
            value = getattr(self, name)
            if value is not None and not _ISSUER_WORD.fullmatch(value):
                raise ValueError(
                    f"identity.issuer.{name} must be one word of letters, digits and ._~:/?@+,=%-, because the edge's "
                    f"configuration contains it, got '{value}'."
                )
        for name in ("role_claim", "purpose_claim", "tenant_claim", "scope_claim"):
            if not _CLAIM.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"identity.issuer.{name} must be letters, digits and '_', because the edge reads it as a path, "
                    f"got '{getattr(self, name)}'. Configure the issuer to map the claim to such a name."
                )


@dataclass(kw_only=True, slots=True)
class IdentityConfig:
    """The identity that a job acts with, and the issuer of its tokens."""

    issuer: IssuerConfig = field(default_factory=IssuerConfig)
    service_token_file: str | None = None
    """File with the replicas' token, renewed by another process. With null, the development issuer creates it."""
    supervisor_token_file: str | None = None
    """File with the supervisor's intent for `serve_apps.deploy`. An external process renews the file. With null, the
    development issuer creates the intent. With an OIDC issuer and no file, a restarted head has no applications."""
    token_file: str | None = None
    """File with an intent, or with an access token that is exchanged for an intent; or `vault:<path>#<field>`, a secret
    in Vault's KV store. With null, the development issuer creates an intent for the user."""
    role: str = "admin"
    """Role in an intent of the development issuer."""
    purpose: str = ""
    """Purpose in an intent of the development issuer."""
    environment: str = "local"
    """The installation's environment in the policies: `local`, `test` or `staging`. Any other name is production."""


@dataclass(kw_only=True, slots=True)
class PortsConfig:
    """TCP ports of a machine: gcs, nodes, edge, serve_http and replicas at `cluster.address`, others on loopback."""

    gcs: int = 6379
    ray_client: int = 10001
    dashboard: int = 8265
    serve_http: int = 8000
    replicas: int = 30000
    """First of 1,000 ports for Serve's replicas."""
    edge: int = 8443
    nodes: int = 8403
    """Where the head admits other nodes and gives them keys. Closed if `cluster.address` is loopback."""
    edge_metrics: int = 8404
    ray_metrics: int = 8080
    supervisor_metrics: int = 8405
    broker_metrics: int = 8406
    edge_controller_metrics: int = 8407
    scheduler_metrics: int = 8408
    nodes_metrics: int = 8409
    uploader_metrics: int = 8410
    jobs_metrics: int = 8411
    rollouts_metrics: int = 8412


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Configuration of the cluster on this machine."""

    address: str = LOOPBACK_ADDRESS
    """IPv4 address of this machine at which other nodes reach it. With loopback, no other node can join."""
    edge_host: str | None = None
    """Address that the edge listens on, besides loopback; 0.0.0.0 is all of this machine. Null is `address`."""
    edge_names: list[str] = field(default_factory=list)
    """More names and addresses of the edge, for its certificate."""
    num_cpus: int = 8
    """Logical CPUs. Their number may exceed the physical CPUs if the processes mostly wait."""
    num_gpus: int = 0
    region: str = "local"
    """Region of this machine, and value of its Ray node label `ray.io/availability-region`."""
    tls: bool = True
    """Whether Ray's processes and drivers use TLS, with certificates on both sides."""
    spill_folder: str | None = None
    """Folder where Ray spills objects when memory is short; null is Ray's temporary folder."""
    object_store_mib: int = 1024
    """Size of Ray's object store in MiB."""
    gcs: GcsConfig = field(default_factory=GcsConfig)
    ports: PortsConfig = field(default_factory=PortsConfig)

    def __post_init__(self) -> None:
        if not is_loopback(self.address) and not self.tls:
            raise ValueError("cluster.tls=false needs a loopback cluster.address. Leave one of the two out.")
        require_edge_names(self.edge_host, self.edge_names)
        if self.num_cpus < 1:
            raise ValueError(f"cluster.num_cpus must be at least 1, got {self.num_cpus}.")
        if self.object_store_mib < 128:
            raise ValueError(f"cluster.object_store_mib must be at least 128, got {self.object_store_mib}.")


class Durability(enum.Enum):
    """How durable the record of a request is at the time of the answer."""

    process = "process"
    """The record survives the end of the replica, even by kill -9."""
    disk = "disk"
    """The record survives a crash of the machine."""
    shared = "shared"
    """The record survives the loss of the machine and its disk: it is in the ledger's PostgreSQL database too."""


@dataclass(kw_only=True, slots=True)
class BatchingConfig:
    """Batching of concurrent requests into one call of the model, for models that batching makes faster."""

    max_rows: int = 64
    """Largest number of rows in one call. With 1, each request is answered alone."""
    max_wait_ms: float = 0.0
    """Longest time in milliseconds to wait for more requests. With 0, only requests that have arrived are batched."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"replica.batching.max_rows must be at least 1, got {self.max_rows}.")
        if not 0 <= self.max_wait_ms <= 1000:
            raise ValueError(
                f"replica.batching.max_wait_ms must be between 0 and 1000, got {self.max_wait_ms}."
            )


@dataclass(kw_only=True, slots=True)
class ReplicaConfig:
    """Replicas of one served model version: a fixed number, or a number that changes with the load."""

    num_replicas: int | None = None
    """Fixed number of replicas; null scales between `min_replicas` and `max_replicas`."""
    min_replicas: int = 0
    """Smallest number of replicas. With 0, an idle version has no replica, and the next request waits for one."""
    max_replicas: int = 2
    target_ongoing_requests: float = 24.0
    """Wanted number of concurrent requests per replica, including requests that wait for the replica."""
    upscale_delay_s: float = 30.0
    """A replica is added when the load was too high for this time, in seconds."""
    downscale_delay_s: float = 300.0
    """A replica, but not the last one, is removed when the load was too low for this time, in seconds."""
    downscale_to_zero_delay_s: float = 1800.0
    """The last replica is removed after this time without a request, in seconds."""
    look_back_s: float = 30.0
    """Seconds over which the load is averaged. Replicas report every two seconds."""
    num_cpus: float = 0.1
    """Logical CPUs that a replica reserves."""
    num_gpus: float = 0.0
    """Share of a GPU that a replica reserves. The share is logical: GPU memory is not isolated."""
    max_ongoing_requests: int = 64
    """Largest number of concurrent requests in a replica. Further requests wait outside."""
    durability: Durability = Durability.process
    """Durability of logged predictions and outcomes at the time of the answer."""
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


_LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(kw_only=True, slots=True)
class WebhookConfig:
    """Who is told when a rollout has ended. Only the operator of the cluster can set this, not a policy."""

    url: str | None = None
    """`https://…`; plain http is allowed on loopback only. Null sends nothing."""
    hosts: list[str] = field(default_factory=list)
    """Hosts that the URL may have."""
    secret: str | None = None
    """Where the secret is that signs each request: a file, `env:<NAME>`, or `vault:<path>#<field>`."""

    def __post_init__(self) -> None:
        if self.url is None:
            return
        target = urlsplit(self.url)
        host = target.hostname or ""
        if target.scheme != "https" and not (target.scheme == "http" and host in _LOOPBACK_HOSTS):
            raise ValueError(
                f"rollouts.webhook.url must be https://…, or http://… on loopback, got '{target.scheme}://{host}'."
            )
        if target.username is not None or target.fragment:
            raise ValueError("rollouts.webhook.url must have no user, password or fragment.")
        if host not in self.hosts:
            raise ValueError(
                f"rollouts.webhook.url has the host '{host}', which is not in rollouts.webhook.hosts. Add it there."
            )
        if self.secret is None:
            raise ValueError(
                "rollouts.webhook.secret is missing. Give a file, `env:<NAME>`, or `vault:<path>#<field>`."
            )


@dataclass(kw_only=True, slots=True)
class SteadyStateConfig:
    """When the monitoring results of a version that serves are an alert."""

    alerts: int = 2
    """So many of the last chunks must be out of their bounds."""
    chunks: int = 3
    """Number of the last chunks that are judged."""

    def __post_init__(self) -> None:
        if not 1 <= self.alerts <= self.chunks:
            raise ValueError(
                f"rollouts.steady_state.alerts must be 1 to chunks ({self.chunks}), got {self.alerts}."
            )


@dataclass(kw_only=True, slots=True)
class RolloutsConfig:
    """Settings of the controller of rollouts."""

    steady_state: SteadyStateConfig = field(default_factory=SteadyStateConfig)
    webhook: WebhookConfig = field(default_factory=WebhookConfig)


@dataclass(kw_only=True, slots=True)
class PlatformConfig:
    """Sections that every job's configuration has. `configs/platform.yaml` and `configs/tier/` set them."""

    tier: Tier = Tier.smb_cpu
    storage: StorageConfig = field(default_factory=StorageConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    identity: IdentityConfig = field(default_factory=IdentityConfig)
    secrets: SecretsConfig = field(default_factory=SecretsConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    jobs: SubmissionConfig = field(default_factory=SubmissionConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
