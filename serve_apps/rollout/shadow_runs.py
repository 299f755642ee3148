"""Rollouts of a shadow: the version gets only copies, and a policy judges it by the logs.

Such a rollout has the weight 0, so the edge sends every unit to the champion, and the champion's records have the
rollout's id and the keyed hash of the unit. The copies have them, too. So both versions' answers can be joined by
request, and counted by unit.
"""

from __future__ import annotations

from cluster.errors import RolloutError
from cluster.ledger.events import LedgerEvent, ShadowStarted
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.history import History
from serve_apps.rollout.serving_state import ModelState

WEIGHT = 0.0
"""Weight of a shadow's rollout: it answers no client."""


def is_shadow(config: RolloutConfig) -> bool:
    """Return whether the policy is one of a shadow."""
    return config.rollout is not None and config.rollout.is_shadow


def require_no_other_shadow(config: RolloutConfig, state: ModelState, version: int) -> None:
    """Refuse to replace the shadow of another version.

    Raises:
        RolloutError: another version is the shadow.
    """
    if is_shadow(config) and state.shadow is not None and state.shadow.version != version:
        raise RolloutError(
            f"Version {state.shadow.version} of '{config.name}' is the shadow. End it first with `action=stop_shadow`."
        )


def shadow_events(config: RolloutConfig, state: ModelState, version: int) -> list[LedgerEvent]:
    """Return the event that starts the copies, or none if the policy is not one of a shadow."""
    if config.rollout is None or not config.rollout.is_shadow:
        return []
    share, app = config.rollout.share, state.apps[version]
    return [ShadowStarted(model=config.name, version=version, app=app, share=share)]


def require_no_shadow_run(config: RolloutConfig, history: History, *, what: str) -> None:
    """Refuse a command that a rollout of a shadow does not allow.

    Raises:
        RolloutError: such a rollout runs.
    """
    if history.run is not None and history.run.is_shadow:
        raise RolloutError(
            f"Rollout {history.run.rollout} of '{config.name}' is one of a shadow, {what} End it with `action=abort`."
        )
