"""A plan in words, for the operator."""

from __future__ import annotations

from cluster.statistics.planning import Plan


def describe(plan: Plan) -> tuple[str, ...]:
    """Return one line for each step, one for each guardrail on a metric, and the time of all steps."""
    lines = []
    for number, step in enumerate(plan.steps, start=1):
        shares = ", ".join(f"{event} from {share:.2%}" for event, share in step.smallest_shares.items())
        lines.append(
            f"step {number}: {step.weight:g} %, {step.units:,} units an arm, {step.duration_s / 3600:.1f} h; "
            f"finds harm in 90 % of cases if so many units have it: {shares}"
        )
    for metric, effect in plan.smallest_effects.items():
        lines.append(f"guardrail {metric}: finds a difference of {effect:.3g} beyond its margin at the end")
    errors = plan.policy.errors
    lines.append(
        f"errors: {plan.guardrail_error:.2%} for each guardrail over {plan.num_windows} windows, "
        f"{errors.goals:.1%} for each goal, {errors.mismatch:.1%} for a mismatch"
    )
    left = plan.policy.deadline_s - plan.duration_s
    lines.append(f"all steps: {plan.duration_s / 3600:.1f} h, {left / 3600:.1f} h before the deadline")
    return tuple(lines)
