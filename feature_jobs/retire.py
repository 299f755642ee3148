"""`python -m feature_jobs.retire view=v reason=… [deprecate=true | restore=true]`: end a view, announce it, or take it
back.

Nothing is deleted: rows stay, every version stays readable, and a model that was made with the view goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import FeatureViewStateChanged
from cluster.security.acting import act
from cluster.security.authorization.policy import Action, Resource
from cluster.session import require_record
from cluster.settings import PlatformConfig
from feature_jobs.store.catalog.lifecycle import ViewState, read_lifecycles
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import view_spec


@dataclass(kw_only=True, slots=True)
class RetireConfig(PlatformConfig):
    """Which view, and why."""

    view: str = "???"
    reason: str = "???"
    """Who uses the view reads it: say what to use instead."""
    deprecate: bool = False
    """Only warn whoever makes something new with it."""
    restore: bool = False
    """Make it active again."""

    def __post_init__(self) -> None:
        if self.deprecate and self.restore:
            raise ValueError("deprecate and restore exclude each other.")

    @property
    def state(self) -> ViewState:
        """What the view will be."""
        if self.restore:
            return ViewState.active
        return ViewState.deprecated if self.deprecate else ViewState.retired


@job("retire", RetireConfig)
def main(config: RetireConfig) -> None:
    """Change one view's state."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.retire")
    view = view_spec(ledger, config.view)
    region = view.region or config.cluster.region
    actor.check(Action.apply_definitions, Resource(kind="feature view", name=view.name, region=region))
    known = read_lifecycles(ledger).get(view.name)
    before = ViewState.active if known is None else known.state
    if before is config.state:
        print(f"view {view.name}: {before.value} already; nothing to do")
        return
    event = FeatureViewStateChanged(
        view=view.name, state=config.state.value, previous=before.value, reason=config.reason
    )
    ledger.append(event, actor=actor.name)
    print(f"view {view.name}: {before.value} -> {config.state.value}")
    for use in read_recorded(ledger).uses:
        if view.name in use.view_versions and config.state is not ViewState.active:
            print(f"  model {use.model} version {use.version} goes on reading it")


if __name__ == "__main__":
    main()
