"""Parts of a replica. They are opened one by one from the configuration and a verified model version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.ledger import Ledger, open_ledger
from cluster.records.location import max_age_s, prediction_log
from cluster.records.schema import PredictionRecord
from cluster.registry import ModelVersion, Registry
from cluster.runtime import InputSpec, Model, ModelSignature
from cluster.runtime.device_choice import find_hardware
from cluster.runtime.hidden_packages import UNUSED_BY_ENGINES, hidden
from cluster.runtime.loader import load_model
from cluster.security.authorization.policy import Resource
from cluster.security.edge_proof import edge_proof
from cluster.security.keys.access import KeyAccess, key_store, service_access
from cluster.security.keys.store import KeyStore
from cluster.security.tls.certificates import CA_NAME
from cluster.session import ClusterRecord, require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import Layout, layout
from feature_jobs.store.catalog.log_keys import prediction_key, serving_purpose, with_read_features
from feature_jobs.store.catalog.specifications import FieldSpec, service_spec
from feature_jobs.store.online.reader import FeatureReader, open_online_store
from serve_apps.predictor.on_demand_inputs import on_demand_inputs
from serve_apps.predictor.shadow import Shadowing
from serve_apps.replica.access import AccessCheck
from serve_apps.replica.process import is_replica
from serve_apps.replica.record_log import RecordLog
from serve_apps.replica.requested import RequestedNumber
from serve_apps.replica.targets import serve_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedFeatures:
    """What a model reads by key, and the inputs that only a request can contain."""

    reader: FeatureReader | None = None
    """Reader of the features. None for a model that was trained without a feature service."""
    request_inputs: dict[str, InputSpec | FieldSpec] = field(default_factory=dict)
    """Inputs of on-demand transforms."""
    resource: Resource | None = None
    """Resource that a caller needs permission for. None means the model itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Opens the parts of one version's replica, with the replica's own identity."""

    platform: PlatformConfig
    places: Layout
    ledger: Ledger
    cluster: ClusterRecord
    version: ModelVersion
    access: KeyAccess
    store: KeyStore

    @classmethod
    def of(cls, platform: PlatformConfig, name: str, version: int) -> Parts:
        """Verify a version's files against the registry, and return the parts.

        Raises:
            ArtifactTampered: a file is not the registered one. An event about this was appended to the ledger.
        """
        places, ledger = layout(platform.storage), open_ledger(platform)
        registry = Registry(ledger, places)
        registered = registry.get(name, version)
        registry.check_files(registered, actor=f"service:{name}")
        purpose = platform.identity.purpose or serving_purpose(ledger, registered)
        cluster = require_running_cluster(platform)
        access = service_access(platform, cluster, name=name, purpose=purpose)
        return cls(
            platform=platform,
            places=places,
            ledger=ledger,
            cluster=cluster,
            version=registered,
            access=access,
            store=key_store(access),
        )

    def model(self) -> Model:
        """Load the model."""
        replica = self.platform.replica
        hardware = find_hardware(num_cpus=replica.num_cpus, num_gpus=replica.num_gpus)
        with hidden(*UNUSED_BY_ENGINES if is_replica() else ()):
            return load_model(self.version, self.store, hardware=hardware)

    def access_check(self) -> AccessCheck:
        """Build the check of tokens and permissions for this version."""
        resource = self.version.resource(region=self.platform.cluster.region)
        return AccessCheck.of(self.platform, resource, self.ledger)

    def log(self) -> RecordLog:
        """Open the prediction log."""
        return RecordLog(
            prediction_log(self.places, self.ledger, self.version.name),
            store=self.store,
            key=prediction_key(self.ledger, self.version),
            durability=self.platform.replica.durability,
            max_age_s=max_age_s(self.platform.storage),
        )

    def features(self, signature: ModelSignature) -> ServedFeatures:
        """Open the online store for the model's features. A model without a feature service reads no features."""
        if not signature.service:
            return ServedFeatures()
        spec = service_spec(self.ledger, signature.service, signature.service_version)
        online = open_online_store(self.platform.online, self.places, self.store, fails_fast=True)
        region = self.platform.cluster.region
        model = self.version.resource(region=region)
        return ServedFeatures(
            reader=FeatureReader(spec, online),
            request_inputs=on_demand_inputs(spec),
            resource=with_read_features(model, spec.views, region=region),
        )

    def requested_number(self) -> RequestedNumber:
        """Start the thread that reads how many replicas a rollout has requested."""
        return RequestedNumber(self.ledger, self.version.name, self.version.version)

    def shadowing(
        self, count: Callable[[str], None], append: Callable[[PredictionRecord], None]
    ) -> Shadowing:
        """Start the thread that watches for a shadow of the model."""
        return Shadowing(
            model=self.version.name,
            version=self.version.version,
            ledger=self.ledger,
            fetch_targets=serve_targets(self.cluster),
            token=self.access.token_reader(),
            proof=edge_proof(self.places),
            authority=f"{self.places.tls}/{CA_NAME}",
            count=count,
            append=append,
        )
