"""A plan in words, for the operator."""

from __future__ import annotations

from cluster.statistics.planning import Plan
from cluster.statistics.policy import Form


def describe(plan: Plan) -> tuple[str, ...]:
    """Return one line for each step, one for each guardrail on a metric, and the time of all steps."""
    lines = []
    for number, step in enumerate(plan.steps, start=1):
        shares = ", ".join(f"{event} from {share:.2%}" for event, share in step.smallest_shares.items())
        is_shadow = plan.policy.is_shadow
        head = f"copies of {step.weight:g} % of the requests" if is_shadow else f"{step.weight:g} %"
        of = "units" if is_shadow else "units an arm"
        lines.append(
            f"step {number}: {head}, {step.units:,} {of}, {step.duration_s / 3600:.1f} h; "
            f"finds harm in 90 % of cases if so many units have it: {shares}"
        )
    for metric, effect in plan.smallest_effects.items():
        lines.append(
            f"guardrail {_name(plan, metric)}: finds a difference of {effect:.3g} beyond its margin at the end"
        )
    for signal in plan.policy.signals:
        effect, metric = plan.smallest_signals[signal.name], _name(plan, signal.metric)
        where = f" for {signal.column}={signal.value}" if signal.column else ""
        lines.append(
            f"signal {metric}{where}: holds at a difference of {effect:.3g} beyond its margin at the end"
        )
    for goal in plan.policy.goals:
        lines.append(f"goal {_name(plan, goal.metric)}: {goal.kind} with a margin of {goal.margin.size:g}")
    errors = plan.policy.errors
    lines.append(
        f"errors: {plan.guardrail_error:.2%} for each guardrail over {plan.num_windows} windows, "
        f"{errors.goals:.1%} for each goal, {errors.mismatch:.1%} for a mismatch"
        + (f", {plan.signal_error:.2%} for each signal" if plan.policy.signals else "")
    )
    left = plan.policy.deadline_s - plan.duration_s
    lines.append(f"all steps: {plan.duration_s / 3600:.1f} h, {left / 3600:.1f} h before the deadline")
    return tuple(lines)


def _name(plan: Plan, metric: str) -> str:
    """Return a metric's name, with its form if it is no mean."""
    form = plan.policy.metric(metric).form
    return metric if form is Form.mean else f"{metric} ({form})"
