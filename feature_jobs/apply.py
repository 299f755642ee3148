"""`python -m feature_jobs.apply definitions=m`: make the keys of a module's views, and record them in the ledger."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.security.acting import act
from cluster.security.keys.access import key_store
from cluster.security.policy import Action, Resource
from cluster.session import require_record
from cluster.settings import PlatformConfig
from feature_jobs.store.catalog import apply, load_definitions
from feature_jobs.store.protection import service_keys, view_keys


@dataclass(kw_only=True, slots=True)
class ApplyConfig(PlatformConfig):
    """What is applied."""

    definitions: str = "feature_jobs.census"


@job("apply", ApplyConfig)
def main(config: ApplyConfig) -> None:
    """Apply a module."""
    record = require_record(config)
    definitions = load_definitions(config.definitions)
    ledger = open_ledger(config)
    actor = act(config, record, ledger, entrypoint="feature_jobs.apply")
    region = config.cluster.region
    actor.check(
        Action.apply_definitions,
        *(
            Resource(kind="feature view", name=name, region=view.region or region)
            for name, view in definitions.views.items()
        ),
    )
    keys = key_store(actor.access)
    for info in (
        *(info for view in definitions.views.values() for info in view_keys(view, region=region)),
        *(info for service in definitions.services.values() for info in service_keys(service, region=region)),
    ):
        keys.ensure(info)
    applied = apply(definitions, ledger, actor=actor.name)
    for kind, names, changed in (
        ("view", definitions.views, applied.views),
        ("service", definitions.services, applied.services),
    ):
        for name in names:
            print(
                f"{kind} {name}: " + (f"applied version {changed[name]}" if name in changed else "unchanged")
            )


if __name__ == "__main__":
    main()
