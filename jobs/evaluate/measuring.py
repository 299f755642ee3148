"""All measurements of one evaluation, from scored rows to the fields of the ledger's event."""

from __future__ import annotations

from typing import Any

from cluster.errors import ConfigError
from cluster.registry import ModelVersion
from cluster.runtime import Model, Task
from jobs.evaluate.attributions import attribute
from jobs.evaluate.bootstrap import Statistic, intervals, metric_statistic
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.fairness import OPPORTUNITY, PARITY, difference_statistic, group_rates, with_intervals
from jobs.evaluate.robustness import measure_robustness
from jobs.evaluate.rows import ScoredRows, entity_columns, entity_numbers, group_values, score_rows, select
from jobs.evaluate.threshold import choose_threshold
from jobs.train.data import TrainingSet
from jobs.train.version_rows import validation_rows

Json = dict[str, Any]


def require_binary(config: EvaluateConfig, task: Task) -> None:
    """Require a binary task for what is defined only there.

    Raises:
        ConfigError: `fairness` or `cost` is set for another task.
    """
    if task is Task.binary:
        return
    for name, is_set in (("fairness", bool(config.fairness)), ("cost", config.cost.is_stated)):
        if is_set:
            raise ConfigError(
                f"`{name}` needs a binary task, and the model's task is {task.value}. Leave it out."
            )


def measure_fairness_and_intervals(
    config: EvaluateConfig, version: ModelVersion, source: TrainingSet, rows: ScoredRows
) -> tuple[Json, Json]:
    """Return the intervals of all metrics, and the fairness of each declared column with its intervals."""
    statistics: list[Statistic] = [metric_statistic(rows.predictions, rows.target)]
    fairness: Json = {}
    for column in config.fairness:
        selected = rows.predictions.scores >= rows.predictions.signature.threshold
        positive, values = rows.target == 1, group_values(rows.table, column)
        fairness[column] = group_rates(selected, positive, values, min_rows=config.min_slice_rows)
        statistics.append(difference_statistic(column, fairness[column], selected, positive, values))
    if not config.bootstrap.replicates:
        return {}, fairness
    columns = entity_columns(version, source, config.bootstrap.entities)
    entities = entity_numbers(rows.table, columns)
    found = intervals(
        statistics,
        entities,
        replicates=config.bootstrap.replicates,
        level=config.bootstrap.level,
        seed=config.seed,
    )
    fairness = with_intervals(fairness, found)
    return {
        "level": config.bootstrap.level,
        "replicates": config.bootstrap.replicates,
        "seed": config.seed,
        "entity_columns": columns,
        "entities": int(entities.max()) + 1,
        "metrics": {name: interval for name, interval in found.items() if "\x1f" not in name},
    }, fairness


def measure_inputs(config: EvaluateConfig, model: Model, rows: ScoredRows) -> tuple[Json, Json]:
    """Return attributions and robustness. Each is empty if it is turned off."""
    attributions: Json = {}
    important = model.signature.columns
    if config.attributions.rows:
        attributions = attribute(model, rows.matrix, config.attributions, seed=config.seed)
        important = list(attributions["inputs"])
    if not config.robustness.rows:
        return attributions, {}
    return attributions, measure_robustness(
        model, rows, config.robustness, important=important, seed=config.seed
    )


def measure_threshold(
    config: EvaluateConfig, version: ModelVersion, model: Model, source: TrainingSet, rows: ScoredRows
) -> Json:
    """Return the threshold with the lowest stated cost; empty if no cost is stated.

    Raises:
        TrainingSetError: The version has no validation rows in this data set.
    """
    if not config.cost.is_stated:
        return {}
    validation = score_rows(model, select(source, validation_rows(version, source)))
    return choose_threshold(
        (validation.predictions.scores, validation.target),
        (rows.predictions.scores, rows.target),
        config.cost.stated(),
        current=model.signature.threshold,
    )


def required_values(metrics: Json, fairness: Json, threshold: Json) -> dict[str, float | None]:
    """Return the values that `require` compares with its bounds."""
    values: dict[str, float | None] = dict(metrics)
    for name in (PARITY, OPPORTUNITY):
        found = [rates[name] for rates in fairness.values()]
        # A column whose groups cannot be compared does not meet a bound.
        values[name] = None if not found or None in found else max(found)
    values["cost"] = threshold.get("cost_of_chosen")
    return values
