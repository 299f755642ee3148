"""`python -m feature_jobs.apply definitions=m [plan=true]`: print a plan, create keys, record the definitions.

The plan says for each change whether it breaks readers of earlier versions (`store/catalog/differences.py`). A plan
that would break a registered model is refused. With `plan=true` the command stops after the plan: it records nothing
and does not call the key store. Its exit code is the same as without `plan=true`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import Layout, layout
from feature_jobs.store.catalog.lifecycle import read_lifecycles
from feature_jobs.store.catalog.plan import make_plan, plan_lines, require_no_broken_models
from feature_jobs.store.catalog.protection import service_keys, view_keys
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import Definitions, apply, load_definitions
from feature_jobs.store.definitions.views import Sensitivity
from feature_jobs.store.types.key_types import require_declared_types


@dataclass(kw_only=True, slots=True)
class ApplyConfig(PlatformConfig):
    """Configuration of the apply command."""

    definitions: str = "feature_jobs.census"
    """Module with the definitions."""
    plan: bool = False
    """Print only the plan."""
    allow_breaking: bool = False
    """Apply a change that breaks a registered model if the model can still read its own version of the view."""


@job("apply", ApplyConfig)
def main(config: ApplyConfig) -> None:
    """Print the plan and apply the definitions."""
    record = require_running_cluster(config)
    definitions = load_definitions(config.definitions)
    ledger = open_ledger(config)
    actor = create_actor(config, record, ledger, entrypoint="feature_jobs.apply")
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
    for name in views_without_purpose(definitions):
        print(
            f"warning: view {name} has personal or sensitive fields and lists no purposes, so a principal that may "
            "read its columns may read them for any purpose. List the purposes with `purposes=[…]`.",
            flush=True,
        )
    require_no_broken_models(plan, allow_breaking=config.allow_breaking)
    require_stored_key_types(definitions, layout(config.storage))
    if not config.plan:
        record_definitions(definitions, ledger, actor, region=region)


def require_stored_key_types(definitions: Definitions, paths: Layout) -> None:
    """Require that existing feature tables store their join keys with the declared types.

    Raises:
        DefinitionError: A stored type is not the declared type. The message names the view, the key and both types.
    """
    for name, view in definitions.views.items():
        if not view.key_types:
            continue
        # Imported here, because it imports Polars and delta-rs.
        from feature_jobs.store.offline import tables as offline

        table = offline.open_table(paths.features(name))
        require_declared_types(name, view.key_types, offline.stored_key_types(table, view.join_keys))


def views_without_purpose(definitions: Definitions) -> list[str]:
    """Return the names of views that have personal or sensitive fields and list no purposes."""
    protected = {Sensitivity.PERSONAL, Sensitivity.SENSITIVE}
    return sorted(
        name
        for name, view in definitions.views.items()
        if not view.purposes and any(field.sensitivity in protected for field in view.schema)
    )


def record_definitions(definitions: Definitions, ledger: Ledger, actor: Actor, *, region: str) -> None:
    """Ensure that the keys of the definitions exist, then record the definitions that changed."""
    keys = key_store(actor.access)
    for view in definitions.views.values():
        for info in view_keys(view, region=region):
            keys.ensure(info)
    for service in definitions.services.values():
        for info in service_keys(service, region=region):
            keys.ensure(info)
    applied = apply(definitions, ledger, actor=actor.name)
    for kind, changed in (("view", applied.views), ("service", applied.services)):
        for name, version in changed.items():
            print(f"{kind} {name}: applied version {version}")


if __name__ == "__main__":
    main()
