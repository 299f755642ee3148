"""Where both versions may be compared on the same logged requests, and where that is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.errors import RolloutError
from cluster.statistics.policy import Form
from serve_apps.rollout.evidence.metric_rules import MetricRule

if TYPE_CHECKING:
    from cluster.runtime.signature import ModelSignature


def require_paired_conditions(
    rules: Iterable[MetricRule], *, outcomes_independent: bool, is_shadow: bool
) -> None:
    """Require what a policy must declare for paired metrics.

    The other conditions hold by construction. Requests are later than the training data of both versions, because both
    were registered before the rollout, and a request with an `as_of` before its start is left out. Features are those
    of the request, because the log has them. A unit gives one value: the mean of its differences.

    Raises:
        ValueError: A declaration is missing.
    """
    for rule in rules:
        if rule.form is Form.paired and rule.is_quality and not outcomes_independent:
            raise ValueError(
                f"rollout.metrics: '{rule.name}' is paired, so an outcome must not depend on the prediction: the other "
                "version's prediction would be judged by an outcome that it did not cause. If this holds, set "
                "rollout.outcomes_independent=true."
            )
        if rule.form is Form.paired and not rule.is_quality and not is_shadow:
            raise ValueError(
                f"rollout.metrics: '{rule.name}' is paired, but only one version answers a request, and its record has "
                "only that version's cost. Use `form: mean` or `ratio`, or `mode: shadow`."
            )


def require_same_inputs(treatment: ModelSignature, champion: ModelSignature) -> None:
    """Require that both versions can score the logged features of the other one.

    Raises:
        RolloutError: One version reads an input that the other one does not.
    """
    ours, theirs = ({spec.name for spec in one.inputs} for one in (treatment, champion))
    if only := sorted(ours ^ theirs):
        which = "treatment" if only[0] in ours else "champion"
        raise RolloutError(
            f"A paired metric needs the same inputs in both versions, but only the {which} reads '{only[0]}'. Use "
            "another form, or `mode: shadow`."
        )
    if treatment.task is not champion.task or treatment.classes != champion.classes:
        raise RolloutError("A paired metric needs the same task and the same classes in both versions.")
