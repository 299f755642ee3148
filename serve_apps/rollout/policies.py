"""What the rollout command does with policies: plan, start, show; and which events take a rollout back."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from cluster.errors import ConfigError, RolloutError
from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, PolicyStarted, RolloutStarted
from cluster.ledger.store import utc_now
from cluster.security.tokens.principal import Principal, principal_as_json
from serve_apps.rollout import shadow_runs, transitions
from serve_apps.rollout.assignment import UnitKind
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.history import History, PolicyRun, step_at
from serve_apps.rollout.json_form import as_json, from_json
from serve_apps.rollout.serving_state import ModelState

if TYPE_CHECKING:
    from cluster.statistics.planning import Plan
    from serve_apps.rollout.evidence.store import EvidenceStore
    from serve_apps.rollout.policy.spec import RolloutSpec

ROLLBACK_TRIES = 5
"""A rollback is tried again if the rollout changes at the same moment, for example because the controller decides."""


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


def started_events(
    config: RolloutConfig, the_plan: Plan | None, *, version: int, champion: int, principal: Principal
) -> tuple[RolloutStarted, list[LedgerEvent]]:
    """Return the event that starts a rollout with a new id and salt, and all events of the start.

    Args:
        config: Model, variant, weight and policy.
        the_plan: Plan of the policy, or None without one. Then nothing decides by itself.
        version: The version to try.
        champion: The champion.
        principal: The starter.
    """
    started = RolloutStarted(
        model=config.name,
        rollout=secrets.token_hex(4),
        salt=secrets.token_hex(8),
        treatment_version=version,
        treatment_variant=config.variant,
        champion_version=champion,
        weight=config.weight if the_plan is None else _first_weight(the_plan),
        unit=(UnitKind.header if config.rollout is None else config.rollout.unit).value,
    )
    if the_plan is None or config.rollout is None:
        return started, [started]
    policy = PolicyStarted(
        model=config.name,
        rollout=started.rollout,
        version=version,
        policy=policy_name(config),
        plan=as_json(the_plan),
        traffic=as_json(config.rollout.expected_traffic()),
        slow_ms=config.rollout.slow_ms,
        scoring=config.rollout.scoring(),
        starter=principal_as_json(principal),
    )
    return started, [started, policy]


def _first_weight(the_plan: Plan) -> float:
    """Return the weight at the start. A shadow answers no client."""
    return shadow_runs.WEIGHT if the_plan.policy.is_shadow else the_plan.policy.steps[0].weight


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


def evidence_store(ledger: Ledger) -> EvidenceStore:
    """Return the counts of the rollouts of a ledger."""
    from serve_apps.rollout.evidence.store import EvidenceStore  # NumPy is slow to import

    return EvidenceStore(ledger.engine)


def count_units(store: EvidenceStore, rollout: str, spec: RolloutSpec) -> None:
    """Let the edges count the units of a rollout with a policy. Call it before the event of the start."""
    from serve_apps.rollout.evidence.store import Counting

    store.register(rollout, Counting(slow_ms=spec.slow_ms, max_units=spec.max_units))


def verdict_now(store: EvidenceStore, run: PolicyRun) -> dict[str, Any]:
    """Return the verdict that the counts of the controller's last look give, and what is missing for the next step."""
    from cluster.statistics.planning import Plan
    from serve_apps.rollout.looks import last_decision

    decision = last_decision(store.last_look(run.rollout), run, from_json(Plan, run.plan))
    return {
        "verdict": decision.verdict.value,
        "reasons": list(decision.reasons),
        "missing": list(decision.missing),
    }


def policy_status(history: History, store: Callable[[], EvidenceStore]) -> dict[str, Any]:
    """Return the policy's part of `action=show`: step, last decision, and what is missing for the next step now."""
    run, promotion = history.run, history.promotion
    status: dict[str, Any] = {
        "promotion": None if promotion is None else asdict(promotion),
        "policy": None,
        "judged_until": None if history.watch is None else history.watch.until.isoformat(),
    }
    if run is None:
        return status
    weights = [step["weight"] for step in run.plan["steps"]]
    last = run.last
    return status | {
        "policy": {
            "name": run.policy,
            "starter": run.subject,
            "started_at": run.started_at,
            "step": f"{step_at(weights, run.weight) + 1} of {len(weights)}",
            "step_started_at": run.step_started_at,
            "paused": run.is_paused,
            "decisions": run.decisions,
            "last_decision": None if last is None else asdict(last),
            "now": verdict_now(store(), run),
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
        ending = transitions.Ending(model=config.name, rollout=state.rollout, run=history.run, reason=reason)
        events = transitions.rollback(ending, outcome=outcome)
        version, champion = state.rollout.treatment_version, state.champion_version
        return RollbackChange(rollout=state.rollout.id, version=version, champion=champion, events=events)
    promoted = history.promotion
    if promoted is None:
        raise RolloutError(f"No rollout of '{config.name}' runs. Start one with `action=start version=…`.")
    now = now or utc_now()
    age_h = (now - dt.datetime.fromisoformat(promoted.at)).total_seconds() / 3600
    own_h = (history.rollback_until(promoted) - dt.datetime.fromisoformat(promoted.at)).total_seconds() / 3600
    window_h = own_h if config.rollback_window_h is None else config.rollback_window_h
    if age_h > window_h:
        raise RolloutError(
            f"Rollout {promoted.rollout} of '{config.name}' was promoted {age_h:.1f} h ago, and "
            f"the rollback window is {window_h:.4g} h. Give a greater `rollback_window_h`, or start a "
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
