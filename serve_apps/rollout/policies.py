"""What the rollout command does with policies: plan, start, show; and which events take a rollout back."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from cluster.errors import ConfigError, RolloutError
from cluster.ledger.events import LedgerEvent, PolicyStarted, RolloutStarted
from cluster.ledger.store import utc_now
from cluster.security.acting import Actor
from cluster.security.tokens.principal import principal_as_json
from serve_apps.rollout import transitions
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.history import History, PolicyRun
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.serving_state import ModelState

if TYPE_CHECKING:
    from cluster.statistics.planning import Plan


def print_plan(config: RolloutConfig) -> dict[str, Any]:
    """Print units and time of each step, and the smallest harm that is found; return the plan.

    Raises:
        ConfigError: no policy is given.
        RolloutError: the policy cannot finish before its deadline.
    """
    from cluster.statistics.plan_report import describe  # SciPy is slow to import

    if config.rollout is None:
        raise ConfigError(
            "Give the name of a policy: `rollout=<name>` for configs/rollout/<name>.yaml, with `--config-dir FOLDER` "
            "for FOLDER/rollout/<name>.yaml."
        )
    the_plan = config.rollout.plan()
    print("\n".join(describe(the_plan)))
    result: dict[str, Any] = as_json(the_plan)
    return result


def policy_name(config: RolloutConfig) -> str:
    """Return the name of the policy that the command line selects, or "" without one."""
    if config.rollout is None:
        return ""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return str(choices.get("rollout") or "unnamed")


def policy_started(
    config: RolloutConfig, the_plan: Plan, started: RolloutStarted, actor: Actor
) -> PolicyStarted:
    """Return the event that lets the controller lead a rollout."""
    assert config.rollout is not None
    return PolicyStarted(
        model=config.name,
        rollout=started.rollout,
        version=started.treatment_version,
        policy=policy_name(config),
        plan=as_json(the_plan),
        traffic=as_json(config.rollout.expected_traffic()),
        slow_ms=config.rollout.slow_ms,
        starter=principal_as_json(actor.principal),
    )


def require_policy_run(config: RolloutConfig, history: History) -> PolicyRun:
    """Return the running rollout that follows a policy.

    Raises:
        RolloutError: none runs.
    """
    if history.run is None:
        raise RolloutError(
            f"No rollout of '{config.name}' follows a policy. `action=start version=… rollout=<policy>` starts one."
        )
    return history.run


def policy_status(history: History) -> dict[str, Any]:
    """Return the policy's part of `action=show`: step, last decision, and what is missing for the next step."""
    run, promotion = history.run, history.promotion
    status: dict[str, Any] = {"promotion": None if promotion is None else asdict(promotion), "policy": None}
    if run is None:
        return status
    weights = [step["weight"] for step in run.plan["steps"]]
    last = run.last
    return status | {
        "policy": {
            "name": run.policy,
            "starter": run.subject,
            "started_at": run.started_at,
            "step": f"{weights.index(run.weight) + 1} of {len(weights)}",
            "step_started_at": run.step_started_at,
            "paused": run.is_paused,
            "decisions": run.decisions,
            "verdict": None if last is None else last.verdict,
            "decided_at": None if last is None else last.at,
            "reasons": [] if last is None else last.reasons,
            "missing": [] if last is None else last.missing,
            "not_done": "" if last is None else last.not_done,
        }
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackChange:
    """What takes a rollout back."""

    rollout: str
    version: int
    """The version that loses its units."""
    champion: int | None
    """The version that answers afterwards."""
    events: Sequence[LedgerEvent]


def rollback_change(
    config: RolloutConfig,
    state: ModelState,
    history: History,
    reason: str,
    *,
    now: dt.datetime | None = None,
) -> RollbackChange:
    """Return what takes back the running rollout, or the last promotion within the rollback window.

    Raises:
        RolloutError: there is neither, or the version before the promotion cannot answer.
    """
    if state.rollout is not None:
        outcome = "aborted" if reason.startswith("aborted ") else "rolled_back"
        events = transitions.rollback(
            config.name, rollout=state.rollout.id, reason=reason, run=history.run, outcome=outcome
        )
        version, champion = state.rollout.treatment_version, state.champion_version
        return RollbackChange(rollout=state.rollout.id, version=version, champion=champion, events=events)
    promoted = history.promotion
    if promoted is None:
        raise RolloutError(f"No rollout of '{config.name}' runs. Start one with `action=start version=…`.")
    age = (now or utc_now()) - dt.datetime.fromisoformat(promoted.at)
    if age > dt.timedelta(hours=config.rollback_window_h):
        raise RolloutError(
            f"Rollout {promoted.rollout} of '{config.name}' was promoted {age.total_seconds() / 3600:.1f} h ago, and "
            f"the rollback window is {config.rollback_window_h:g} h. Give a greater `rollback_window_h`, or start a "
            f"rollout of version {promoted.predecessor}."
        )
    if history.champion != promoted.version:
        raise RolloutError(
            f"Rollout {promoted.rollout} promoted version {promoted.version} of '{config.name}', but the champion is "
            f"version {history.champion} now, so there is nothing to take back."
        )
    if promoted.predecessor not in state.apps:
        raise RolloutError(
            f"Version {promoted.predecessor} of '{config.name}', the champion before rollout {promoted.rollout}, is "
            f"not deployed any more. Deploy it with `python -m serve_apps.deploy name={config.name} "
            f"version={promoted.predecessor}`, then roll back again."
        )
    return RollbackChange(
        rollout=promoted.rollout,
        version=promoted.version,
        champion=promoted.predecessor,
        events=transitions.rollback_of_promotion(config.name, history, promoted, reason=reason),
    )
