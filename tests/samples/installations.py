"""An installation without processes: ledger, keys, policies and registered models in one folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from cluster.ledger import Ledger
from cluster.ledger.checkpoint import PUBLIC_NAME, ensure_signer
from cluster.ledger.events import TrainingSetBuilt
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.runtime import ModelSignature
from cluster.runtime.signature import NETWORK_FILE
from cluster.security.acting import Actor
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.keys.access import KeyAccess
from cluster.security.keys.keyring import Keyring
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.settings import ClusterConfig, IdentityConfig, StorageConfig, Tier
from cluster.storage import Layout
from feature_jobs.store import FeatureService
from jobs.export_model import ExportModelConfig, export_version
from jobs.import_model import ImportModelConfig, import_version
from jobs.promotion.exporting import Export
from tests.projects.views import apply_service


@dataclass(kw_only=True)
class Installation:
    """One installation below a folder."""

    root: Path
    tier: Tier = Tier.smb_cpu
    region: str = "local"
    environment: str = "local"
    ledger: Ledger = field(init=False)
    keyring: Keyring = field(init=False)

    def __post_init__(self) -> None:
        keys = Path(self.places.keys)
        signer = ensure_signer(keys)
        self.ledger = Ledger(f"sqlite:///{self.places.ledger_path}", signer=signer, checkpoint_every=5)
        ring = keys / "ring.json"
        self.keyring = Keyring(ring, b"k" * 32) if ring.exists() else Keyring.create(ring, b"k" * 32)

    @property
    def places(self) -> Layout:
        return Layout(str(self.root))

    @property
    def registry(self) -> Registry:
        return Registry(self.ledger, self.places)

    @property
    def trusted(self) -> Path:
        """Folder of the trusted keys."""
        folder = Path(self.places.keys) / "trusted"
        folder.mkdir(exist_ok=True)
        return folder

    def trust(self, other: Installation, name: str) -> None:
        shutil.copy(Path(other.places.keys) / PUBLIC_NAME, self.trusted / f"{name}.pub.pem")

    def actor(self, role: Role = Role.ml_engineer, *, purpose: str = "", subject: str = "eve") -> Actor:
        return Actor(
            principal=Principal(subject=subject, role=role, purpose=purpose, expires_at=0),
            access=cast(KeyAccess, None),
            policy=Policy.load(region=self.region),
            environment=self.environment,
            decisions=DecisionRecorder(self.ledger.append),
        )

    def register(
        self,
        folder: Path,
        *,
        service: FeatureService | None = None,
        name: str = "m",
        lineage: Lineage | None = None,
    ) -> ModelVersion:
        """Register a folder of model files, after its training set if a service is given."""
        lineage = lineage or Lineage(training_set_hash="t1", seed=7)
        if service is not None:
            spec = apply_service(self.ledger, service)
            self.ledger.append(training_set(spec.name, spec.version, service), actor="sam")
            lineage = Lineage(training_set_hash="t1", service=spec.name, service_version=spec.version, seed=7)
        family = "tabular_network" if (folder / NETWORK_FILE).exists() else "lightgbm"
        return self.registry.register(
            folder,
            name=name,
            family=family,
            task="binary",
            lineage=lineage,
            metrics={"auc": 0.9},
            store=self.keyring,
            actor="sam",
        )

    def export(self, output: Path, *, actor: Actor | None = None, name: str = "m", **more: Any) -> Export:
        config = ExportModelConfig(name=name, output=str(output), **self._platform(), **more)
        return export_version(config, self.ledger, actor or self.actor(), self.keyring)

    def take(self, file: Path, *, actor: Actor | None = None, **more: Any) -> str:
        """Import a bundle."""
        config = ImportModelConfig(file=str(file), **self._platform(), **more)
        return import_version(config, self.ledger, actor or self.actor(), self.keyring, places=self.places)

    def _platform(self) -> dict[str, Any]:
        return {
            "storage": StorageConfig(root=str(self.root)),
            "tier": self.tier,
            "cluster": ClusterConfig(region=self.region),
            "identity": IdentityConfig(environment=self.environment),
        }


def training_set(service: str, version: str, definition: FeatureService) -> TrainingSetBuilt:
    return TrainingSetBuilt(
        service=service,
        service_version=version,
        view_versions={view.name: view.version for view in definition.views},
        table_versions={},
        entities_hash="e",
        row_hash="t1",
        rows=10,
        output="t.parquet",
    )


def signed_for(signature: ModelSignature, service: FeatureService) -> ModelSignature:
    """Return the signature of a model that reads a service."""
    return replace(signature, service=service.name, service_version=service.version)
