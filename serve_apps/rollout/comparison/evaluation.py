"""Apply the guardrail to a rollout: read the logs, match predictions with outcomes, describe the finding."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from cluster.errors import ArtifactTampered, RecordLogCorrupt, RefusedError, RolloutError
from cluster.ledger import Ledger
from cluster.records.location import outcome_log, prediction_log
from cluster.records.matching import match_outcomes
from cluster.records.progress import ages_as_json, log_age
from cluster.records.reading import iter_outcomes, read_log
from cluster.registry import Registry
from cluster.runtime import OutcomeParser
from cluster.runtime.loader import load_signature
from cluster.security.acting import Actor
from cluster.security.keys.access import key_store
from cluster.storage import layout
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.comparison.guardrail import Finding, Verdict, judge
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.serving_state import Rollout


def evaluate(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> Finding:
    """Apply the guardrail to the predictions of this rollout and their outcomes.

    Raises:
        RolloutError: no prediction has an outcome yet.
    """
    places = layout(config.storage)
    registry, store = Registry(ledger, places), key_store(actor.access)
    predictions, outcome_records = (
        prediction_log(places, ledger, config.name),
        outcome_log(places, ledger, config.name),
    )
    ages = ages_as_json([log_age(predictions), log_age(outcome_records)])
    log = read_log(predictions, store)
    outcomes = list(iter_outcomes(outcome_records, store))
    if log.answers.is_empty() or not outcomes:
        raise RolloutError(
            f"'{config.name}' has no predictions with outcomes yet, so there is nothing to compare."
        )
    of_rollout = log.answers.filter(pl.col("rollout") == rollout.id)
    numbers = {rollout.treatment_version, *of_rollout["version"].to_list()}
    signatures = {number: load_signature(registry.get(config.name, number), store) for number in numbers}
    matched = match_outcomes(
        log.answers, outcomes, {number: OutcomeParser(one) for number, one in signatures.items()}
    )
    finding = judge(
        matched.answers.filter(pl.col("rollout") == rollout.id),
        signature=signatures[rollout.treatment_version],
        min_outcomes=config.min_outcomes,
        max_drop=config.max_drop,
    )
    failed_arms = (
        []
        if log.failures.is_empty()
        else log.failures.filter(pl.col("rollout") == rollout.id)["arm"].to_list()
    )
    return replace(
        finding,
        logs=ages,
        unknown_outcomes=matched.unknown_predictions + matched.unknown_rows,
        treatment_failures=failed_arms.count(Arm.treatment),
        control_failures=failed_arms.count(Arm.control),
    )


def judge_before_promotion(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> str:
    """Describe the outcomes of a rollout, and refuse its promotion if they breach the guardrail.

    Raises:
        RolloutError: the outcomes breach the guardrail.
        RecordLogCorrupt, ArtifactTampered: the log or a version was altered, so the outcomes prove nothing.
    """
    try:
        finding = evaluate(config, ledger, actor, rollout)
    except (RecordLogCorrupt, ArtifactTampered):
        raise
    except RefusedError as error:
        return f"without outcomes: {error}"
    description = describe(finding, min_outcomes=config.min_outcomes)
    if finding.verdict is Verdict.breached:
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' is worse than its control: {description}. Roll it back, or give "
            "the `max_drop` that you accept."
        )
    until = min(age["until"] for age in finding.logs.values())
    return f"{description}; logs complete until {until}"


def describe(finding: Finding, *, min_outcomes: int) -> str:
    """Return a finding in words. The operator sees this text, and a promotion has it in its reason."""
    counts = f"{finding.treatment_outcomes} outcomes of the treatment and {finding.control_outcomes} of the control"
    match finding.verdict:
        case Verdict.too_few:
            return f"without a verdict: {counts}, {min_outcomes} of each are needed"
        case Verdict.undefined:
            return f"without a verdict: {counts}, but {finding.metric} is undefined if all are of one class or value"
    return f"{describe_metrics(finding)}, {counts}"


def describe_metrics(finding: Finding) -> str:
    """Return the metrics of both arms as text. The finding must have both metrics."""
    return f"{finding.metric} {finding.treatment:.3f} against {finding.control:.3f} in control"
