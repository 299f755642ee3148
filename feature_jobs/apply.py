"""`python -m feature_jobs.apply definitions=m [plan=true]`: print what would change, make keys, record the definitions.

The plan comes first and says of each change whether it breaks readers of earlier versions
(`store/catalog/differences.py`). One that would break a registered model is refused. With `plan=true` it ends
there: nothing is recorded, the key store is not asked, and the exit code is what applying would have.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import Layout, layout
from feature_jobs.store.catalog.lifecycle import read_lifecycles
from feature_jobs.store.catalog.plan import make_plan, plan_lines, require_no_broken_models
from feature_jobs.store.catalog.protection import service_keys, view_keys
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import Definitions, apply, load_definitions
from feature_jobs.store.definitions.views import Sensitivity
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.key_types import require_declared_types


@dataclass(kw_only=True, slots=True)
class ApplyConfig(PlatformConfig):
    """What is applied."""

    definitions: str = "feature_jobs.census"
    plan: bool = False
    """Only say what would change."""
    allow_breaking: bool = False
    """Apply even what breaks a registered model, where the model's own version stays readable."""


@job("apply", ApplyConfig)
def main(config: ApplyConfig) -> None:
    """Plan, and apply."""
    record = require_record(config)
    definitions = load_definitions(config.definitions)
    ledger = open_ledger(config)
    actor = act(config, record, ledger, entrypoint="feature_jobs.apply")
    region = config.cluster.region
    actor.check(
        Action.read_metadata if config.plan else Action.apply_definitions,
        *(
            Resource(kind="feature view", name=name, region=view.region or region)
            for name, view in definitions.views.items()
        ),
    )
    plan = make_plan(definitions, read_recorded(ledger), read_lifecycles(ledger))
    print("\n".join(plan_lines(plan)), flush=True)
    for name in for_any_purpose(definitions):
        print(
            f"warning: view {name} has personal or sensitive fields and lists no purposes, so whoever may read columns "
            "may read them for any purpose. List them with `purposes=[…]`.",
            flush=True,
        )
    require_no_broken_models(plan, allow_breaking=config.allow_breaking)
    check_stored_keys(definitions, layout(config.storage))
    if not config.plan:
        record_definitions(definitions, ledger, actor, region=region)


def check_stored_keys(definitions: Definitions, places: Layout) -> None:
    """Refuse a declared type of a join key that is not how the view's table stores it.

    Raises:
        DefinitionError: naming view, key and both types.
    """
    for name, view in definitions.views.items():
        table = offline.open_table(places.features(name)) if view.key_types else None
        require_declared_types(name, view.key_types, offline.stored_key_types(table, view.join_keys))


def for_any_purpose(definitions: Definitions) -> list[str]:
    """The views whose protected fields are under no purpose."""
    guarded = {Sensitivity.PERSONAL, Sensitivity.SENSITIVE}
    return sorted(
        name
        for name, view in definitions.views.items()
        if not view.purposes and any(field.sensitivity in guarded for field in view.schema)
    )


def record_definitions(definitions: Definitions, ledger: Ledger, actor: Actor, *, region: str) -> None:
    """Have the keys that the definitions need, then say in the ledger what changed."""
    keys = key_store(actor.access)
    for info in (
        *(info for view in definitions.views.values() for info in view_keys(view, region=region)),
        *(info for service in definitions.services.values() for info in service_keys(service, region=region)),
    ):
        keys.ensure(info)
    applied = apply(definitions, ledger, actor=actor.name)
    for kind, changed in (("view", applied.views), ("service", applied.services)):
        for name, version in changed.items():
            print(f"{kind} {name}: applied version {version}")


if __name__ == "__main__":
    main()
