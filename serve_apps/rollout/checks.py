"""What a state must be before the rollout command changes it. Each check refuses in one line."""

from __future__ import annotations

from cluster.command_line import given_options
from cluster.errors import RolloutError
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.history import History
from serve_apps.rollout.policies import policy_name
from serve_apps.rollout.serving_state import ModelState, Rollout, Shadow


def running_rollout(config: RolloutConfig, state: ModelState) -> Rollout:
    """Return the running rollout.

    Raises:
        RolloutError: no rollout runs.
    """
    if state.rollout is None:
        raise RolloutError(f"No rollout of '{config.name}' runs. Start one with `action=start version=…`.")
    return state.rollout


def running_shadow(config: RolloutConfig, state: ModelState) -> Shadow:
    """Return the shadow.

    Raises:
        RolloutError: the model has none.
    """
    if state.shadow is None:
        raise RolloutError(f"'{config.name}' has no shadow. Start one with `action=shadow version=…`.")
    return state.shadow


def require_no_rollout(config: RolloutConfig, state: ModelState) -> None:
    """Refuse a second rollout beside a running one.

    Raises:
        RolloutError: a rollout runs.
    """
    if state.rollout is not None:
        raise RolloutError(
            f"Rollout {state.rollout.id} of '{config.name}' already runs, with version "
            f"{state.rollout.treatment_version}. End it first with `action=promote` or `action=rollback`."
        )


def require_no_champion(config: RolloutConfig, state: ModelState, version: int) -> None:
    """Refuse a rollout of the champion, or without one.

    Raises:
        RolloutError: the version is the champion.
    """
    if state.champion_version is None or version == state.champion_version:
        raise RolloutError(
            f"Version {version} is already the champion of '{config.name}'. Start another version."
        )


def require_same(config: RolloutConfig, rollout: Rollout, history: History) -> None:
    """Refuse a second start of a running rollout with other options.

    Raises:
        RolloutError: an option of the command line differs from the running rollout.
    """
    running, requested_policy = "" if history.run is None else history.run.policy, policy_name(config)
    if requested_policy != running:
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' runs with {f'the policy {running}' if running else 'no policy'}, "
            f"not with {requested_policy or 'none'}. Roll it back, and start another one."
        )
    if config.rollout is not None and config.rollout.unit.value != rollout.unit:
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' runs with rollout.unit={rollout.unit}, not with "
            f"{config.rollout.unit.value}. Roll it back, and start another one."
        )
    current = {"weight": rollout.weight, "variant": rollout.treatment_variant}
    for name in sorted(given_options() & current.keys()):
        if (requested := getattr(config, name)) != current[name]:
            raise RolloutError(
                f"Rollout {rollout.id} of '{config.name}' runs with {name} {current[name]}, not {requested}. "
                "Change its weight with `action=weight`, or roll it back and start another one."
            )


def weight_remark(weight: float) -> dict[str, str]:
    """Return a remark if the weight limits how well the arms can be compared."""
    if weight <= 50:
        return {}
    return {
        "remark": "Above 50 % units of the control arm are treated. A comparison from now on says little, and the "
        "weight cannot go back."
    }
