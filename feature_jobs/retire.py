"""`python -m feature_jobs.retire view=v reason=… [deprecate=true | restore=true]`: retire, deprecate or restore a view.

Nothing is deleted. Every version of the view stays readable, and models that were trained with the view continue to use
it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import FeatureViewStateChanged
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from feature_jobs.store.catalog.lifecycle import ViewState, read_lifecycles
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import view_spec


@dataclass(kw_only=True, slots=True)
class RetireConfig(PlatformConfig):
    """Configuration of the retire command."""

    view: str = "???"
    """Name of the view."""
    reason: str = "???"
    """Reason that users of the view see. Say what to use instead."""
    deprecate: bool = False
    """Deprecate the view: its use for new rows or training sets logs a warning."""
    restore: bool = False
    """Make the view active again."""

    def __post_init__(self) -> None:
        if self.deprecate and self.restore:
            raise ValueError("deprecate and restore exclude each other. Set one of them.")

    @property
    def state(self) -> ViewState:
        """The view's new state."""
        if self.restore:
            return ViewState.active
        return ViewState.deprecated if self.deprecate else ViewState.retired


@job("retire", RetireConfig)
def main(config: RetireConfig) -> None:
    """Change the state of one view."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="feature_jobs.retire")
    view = view_spec(ledger, config.view)
    region = view.region or config.cluster.region
    actor.check(Action.apply_definitions, Resource(kind="feature view", name=view.name, region=region))
    lifecycle = read_lifecycles(ledger).get(view.name)
    previous = ViewState.active if lifecycle is None else lifecycle.state
    if previous is config.state:
        print(f"view {view.name}: {previous.value} already; nothing to do")
        return
    event = FeatureViewStateChanged(
        view=view.name, state=config.state.value, previous=previous.value, reason=config.reason
    )
    ledger.append(event, actor=actor.name)
    print(f"view {view.name}: {previous.value} -> {config.state.value}")
    if config.state is not ViewState.active:
        for use in read_recorded(ledger).uses:
            if view.name in use.view_versions:
                print(f"  model {use.model} version {use.version} continues to read it")


if __name__ == "__main__":
    main()
