"""`python -m feature_jobs.apply definitions=m`: record a module's feature views and services in the ledger."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.security.identity import current_actor
from cluster.session import require_record
from cluster.settings import PlatformConfig
from feature_jobs.store.catalog import apply, load_definitions


@dataclass(kw_only=True, slots=True)
class ApplyConfig(PlatformConfig):
    """What is applied."""

    definitions: str = "feature_jobs.census"


@job("apply", ApplyConfig)
def main(config: ApplyConfig) -> None:
    """Apply a module."""
    require_record(config)
    definitions = load_definitions(config.definitions)
    applied = apply(definitions, open_ledger(config), actor=current_actor())
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
