"""What the caller of a run may read and write.

Scores are predictions, so the caller needs the right to predict. For features of the store, the caller also needs the
right to read them. Below the storage root, scores are encrypted with a key of the model. Elsewhere they are not, so a
caller may write there only what this caller may read: the scores, if the policies give the caller their key, and those
inputs whose columns the policies allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.ledger import Ledger
from cluster.registry import ModelVersion
from cluster.security.acting import Actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyNotFound
from feature_jobs.store.catalog.log_keys import column_resources, merged_key, scores_key, with_read_features
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Rights:
    """The rights of a run's caller."""

    actor: Actor
    region: str

    def check_scoring(self, version: ModelVersion, service: ServiceSpec | None) -> None:
        """Require that the caller may predict with a version and read the features of a service.

        Raises:
            AccessDenied: The caller may not.
        """
        model = version.resource(region=self.region)
        views = [] if service is None else service.views
        target = model if service is None else with_read_features(model, views, region=self.region)
        self.actor.check(Action.predict, target)
        for view in views:
            self.actor.check(Action.read_columns, *view_resources(view, region=self.region))

    def ensure_key(self, ledger: Ledger, version: ModelVersion) -> str:
        """Create the key of the model's scores if it does not exist, and return its name.

        Raises:
            RefusedError: The key's records are for other purposes than this version's features.
        """
        keys = key_store(self.actor.access)
        wanted = scores_key(ledger, version, region=self.region)
        try:
            merged = merged_key(keys.info(wanted.name), wanted)
        except KeyNotFound:
            merged = wanted
        keys.ensure(merged)
        return wanted.name

    def check_export(self, ledger: Ledger, version: ModelVersion) -> None:
        """Require that the caller may read the model's scores, and so may write them unencrypted.

        Raises:
            AccessDenied: The caller may not.
        """
        self.actor.check(
            Action.unwrap_key, Resource.from_key(scores_key(ledger, version, region=self.region))
        )

    def exportable(self, columns: Sequence[str], service: ServiceSpec | None) -> list[str]:
        """Return those columns that the caller may write unencrypted.

        Args:
            columns: Columns to write.
            service: The service that the columns come from; None if they are from the caller's own file.
        """
        if service is None:
            return list(columns)
        resources = column_resources(service, region=self.region)
        others = Resource(kind="training set", name=service.name, column_class="internal", region=self.region)
        return [name for name in columns if self._may_read(resources.get(name, others))]

    def _may_read(self, resource: Resource) -> bool:
        decision = self.actor.policy.decide(
            self.actor.principal, Action.read_columns, resource, environment=self.actor.environment
        )
        return decision.allowed
