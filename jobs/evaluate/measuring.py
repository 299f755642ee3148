"""All measurements of one evaluation, from scored rows to the fields of the ledger's event."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa

from cluster.errors import ConfigError
from cluster.ledger.events import ModelEvaluated
from cluster.registry import ModelVersion
from cluster.runtime import Model, Task
from cluster.security.keys.store import KeyStore
from jobs.evaluate.attributions import attribute
from jobs.evaluate.bootstrap import Statistic, intervals, metric_statistic
from jobs.evaluate.config import EvaluateConfig, Rows
from jobs.evaluate.fairness import (
    OPPORTUNITY,
    PARITY,
    SEPARATOR,
    difference_statistic,
    group_rates,
    with_intervals,
)
from jobs.evaluate.parity import measure_parity
from jobs.evaluate.requirements import check_requirements
from jobs.evaluate.robustness import measure_robustness
from jobs.evaluate.rows import ScoredRows, entity_columns, entity_numbers, group_values, score_rows, select
from jobs.evaluate.slices import slice_metrics
from jobs.evaluate.threshold import choose_threshold
from jobs.metrics import score
from jobs.train.data import TrainingSet
from jobs.train.version_rows import held_out_rows, validation_rows

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


def evaluate(
    config: EvaluateConfig, version: ModelVersion, model: Model, source: TrainingSet, store: KeyStore
) -> ModelEvaluated:
    """Measure a version, and return the event with all results.

    Args:
        config: What to measure.
        version: The version.
        model: The version's model.
        source: The data set; `config.rows` says which of its rows count.
        store: Key store with the model's key.

    Raises:
        ConfigError, TrainingSetError, InvalidRequest: The data does not fit the model or the configuration.
    """
    require_binary(config, model.signature.task)
    rows = score_rows(model, choose_rows(config, version, source))
    metrics = score(rows.predictions, rows.target)
    slices = measure_slices(config, rows)
    groups = measure_groups(config, version, source, rows)
    threshold = measure_threshold(config, version, model, source, rows)
    inputs = measure_inputs(config, model, rows)
    return ModelEvaluated(
        name=version.name,
        version=version.version,
        data_hash=source.hash,
        rows=rows.table.num_rows,
        metrics=metrics,
        slices=slices,
        chosen_rows=config.rows.value,
        intervals=groups.intervals,
        fairness=groups.fairness,
        threshold=threshold,
        robustness=inputs.robustness,
        attributions=inputs.attributions,
        parity=measure_parity(version, store, rows),
        requirements=check_requirements(config.require, required_values(metrics, groups.fairness, threshold)),
    )


def choose_rows(config: EvaluateConfig, version: ModelVersion, source: TrainingSet) -> pa.Table:
    """Return the rows to evaluate: all rows, or only the rows that the version's training held out."""
    if config.rows is Rows.all:
        return source.table
    advice = "Give the training set, or set `rows=all` for data that was not used in training."
    return select(source, held_out_rows(version, source, advice=advice))


def measure_slices(config: EvaluateConfig, rows: ScoredRows) -> Json:
    """Measure each value of each column in `slices`."""
    return slice_metrics(
        rows.predictions,
        rows.target,
        table=rows.table,
        columns=list(config.slices),
        min_rows=config.min_slice_rows,
    )


class Groups(NamedTuple):
    """What depends on groups of rows."""

    intervals: Json
    """Intervals of all metrics, from draws of entities."""
    fairness: Json
    """By column: rates of its groups, and their differences with intervals."""


def measure_groups(
    config: EvaluateConfig, version: ModelVersion, source: TrainingSet, rows: ScoredRows
) -> Groups:
    """Measure the fairness of each declared column, and the intervals of all metrics and differences."""
    statistics: list[Statistic] = [metric_statistic(rows.predictions, rows.target)]
    fairness: Json = {}
    for column in config.fairness:
        selected = rows.predictions.scores >= rows.predictions.signature.threshold
        positive, values = rows.target == 1, group_values(rows.table, column)
        fairness[column] = group_rates(selected, positive, values, min_rows=config.min_slice_rows)
        statistics.append(difference_statistic(column, fairness[column], selected, positive, values))
    if not config.bootstrap.replicates:
        return Groups(intervals={}, fairness=fairness)
    columns = entity_columns(version, source, config.bootstrap.entities)
    entities = entity_numbers(rows.table, columns)
    found = intervals(
        statistics,
        entities,
        replicates=config.bootstrap.replicates,
        level=config.bootstrap.level,
        seed=config.seed,
    )
    of_metrics = {name: interval for name, interval in found.items() if SEPARATOR not in name}
    described = {
        "level": config.bootstrap.level,
        "replicates": config.bootstrap.replicates,
        "seed": config.seed,
        "entity_columns": columns,
        "entities": int(entities.max()) + 1,
        "metrics": of_metrics,
    }
    return Groups(intervals=described, fairness=with_intervals(fairness, found))


class Inputs(NamedTuple):
    """What depends on single inputs. Each part is empty if it is turned off."""

    attributions: Json
    robustness: Json


def measure_inputs(config: EvaluateConfig, model: Model, rows: ScoredRows) -> Inputs:
    """Measure attributions, and robustness with the most important inputs."""
    attributions: Json = {}
    important = model.signature.columns
    if config.attributions.rows:
        attributions = attribute(model, rows.matrix, config.attributions, seed=config.seed)
        important = list(attributions["inputs"])
    robustness: Json = {}
    if config.robustness.rows:
        robustness = measure_robustness(model, rows, config.robustness, important=important, seed=config.seed)
    return Inputs(attributions=attributions, robustness=robustness)


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
