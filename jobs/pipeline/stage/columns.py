"""Faults of the columns that stages name, as far as the files exist before a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import did_you_mean
from cluster.storage import is_uri, resolve
from feature_jobs.store.catalog.specifications import ViewSpec
from jobs.pipeline.graph import Stage, is_pattern, references

EVENT_TIMESTAMP = "event_timestamp"
_TRAINING_SET = "feature_jobs.training_set"
_LABELLED = ("jobs.train", "jobs.sweep")


def column_faults(
    stage: Stage, earlier: Iterable[Stage], views: Mapping[str, ViewSpec], services: Mapping[str, list[str]]
) -> Iterator[str]:
    """Yield faults of a stage's entities or label.

    Args:
        stage: The stage.
        earlier: The stages that are done before it.
        views: The views that exist when it starts.
        services: Maps service to its views.
    """
    if stage.command == _TRAINING_SET:
        yield from _entities_faults(stage, views, services)
    elif stage.command in _LABELLED:
        yield from _label_faults(stage, earlier)


def _entities_faults(
    stage: Stage, views: Mapping[str, ViewSpec], services: Mapping[str, list[str]]
) -> Iterator[str]:
    path = _path(stage.parameters.get("entities"))
    columns = _columns(path)
    if columns is None:
        return
    names = services.get(str(stage.parameters.get("service")), [])
    known = [views[name] for name in names if name in views]
    for column in dict.fromkeys([*_entity_keys(known), EVENT_TIMESTAMP]):
        if column not in columns:
            yield f"{path} has no column '{column}'.{did_you_mean(column, columns)}"


def _entity_keys(views: Sequence[ViewSpec]) -> Iterator[str]:
    """Yield the join keys that entity rows need. A feature of an earlier view can be the join key of a later one."""
    features: set[str] = set()
    for view in views:
        yield from (key for key in view.join_keys if key not in features)
        features.update(field.name for field in view.fields)


def _label_faults(stage: Stage, earlier: Iterable[Stage]) -> Iterator[str]:
    training_set, label = _path(stage.parameters.get("training_set")), stage.parameters.get("label")
    if training_set is None or not isinstance(label, str) or any(references(label)):
        return
    made_of = [
        _path(one.parameters.get("entities"))
        for one in earlier
        if one.command == _TRAINING_SET and _path(one.parameters.get("output")) == training_set
    ]
    for path in made_of:
        columns = _columns(path)
        # A feature of the training set is `<view>__<feature>`. It can be the label too.
        if columns is not None and label not in columns and "__" not in label:
            yield f"{path}, of which the training set is made, has no label '{label}'.{did_you_mean(label, columns)}"


def _path(value: Any) -> str | None:
    """Return an absolute path; None if it is not known before the run."""
    return resolve(value) if isinstance(value, str) and not any(references(value)) else None


def _columns(path: str | None) -> list[str] | None:
    """Return the columns of a local Parquet file, or None if it is not there or cannot be read without a key."""
    if path is None or is_uri(path) or is_pattern(path):
        return None
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        return None
