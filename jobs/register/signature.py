"""The signature of a registered graph: what the reference rows and the graph know of each column of its inputs."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import TrainingSetError, did_you_mean
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.runtime.signature import NUMERIC, Label
from jobs.register.artifact import TEXT, Artifact, GraphInput
from jobs.register.config import RegisterConfig
from jobs.train.config import LearningConfig, SplitConfig
from jobs.train.data import TrainingSet
from jobs.train.inputs import input_names
from jobs.train.rows.arrow_types import is_text, value_type
from jobs.train.rows.target import label_column, learn_classes


def read_signature(config: RegisterConfig, artifact: Artifact, source: TrainingSet) -> ModelSignature:
    """Return the signature of a graph.

    Raises:
        TrainingSetError: A column is missing, or has a type that does not fit the graph's input.
    """
    inputs = tuple(
        _input(source.table, name, one, config, artifact)
        for one, names in graph_columns(config, artifact, source)
        for name in names
    )
    manifest = source.manifest
    return ModelSignature(
        task=config.task,
        inputs=inputs,
        label=config.label,
        classes=_classes(config, artifact, source),
        service=manifest.get("service", ""),
        service_version=manifest.get("service_version", ""),
        threshold=config.threshold,
    )


def graph_columns(
    config: RegisterConfig, artifact: Artifact, source: TrainingSet
) -> list[tuple[GraphInput, list[str]]]:
    """Return each input of the graph with the names of its columns in the reference.

    An input of a graph with several inputs takes the column that `columns` names, or the column of the same name, or
    the only column `<view>__<name>`.

    Raises:
        TrainingSetError: There is no such column, or the matrix has another number of columns.
    """
    known = source.table.column_names
    if len(artifact.inputs) == 1 and not config.columns:
        matrix = artifact.inputs[0]
        names = _matrix_columns(config, source)
        if matrix.width not in (None, len(names)) or not names:
            raise TrainingSetError(
                f"The graph's input '{matrix.name}' has {matrix.width} columns, and the reference has {len(names)}: "
                f"{', '.join(names)}. Name the columns in the graph's order: `inputs=[…]`."
            )
        return [(matrix, names)]
    if config.inputs is not None:
        raise TrainingSetError(
            f"`inputs` is for a graph with one matrix, and this graph has {len(artifact.inputs)} inputs. Use "
            "`+columns.<input>=<column>`."
        )
    if unknown := [name for name in config.columns if name not in {one.name for one in artifact.inputs}]:
        names = [one.name for one in artifact.inputs]
        raise TrainingSetError(f"The graph has no input '{unknown[0]}'.{did_you_mean(unknown[0], names)}")
    return [(one, [_column(one.name, config.columns.get(one.name), known)]) for one in artifact.inputs]


def _matrix_columns(config: RegisterConfig, source: TrainingSet) -> list[str]:
    learning = LearningConfig(
        name=config.name,
        training_set=config.reference,
        label=config.label,
        inputs=config.inputs,
        exclude=[] if config.expected is None else [config.expected],
        split=SplitConfig(),
    )
    return input_names(learning, source)


def _column(name: str, configured: str | None, known: list[str]) -> str:
    wanted = configured or name
    if wanted in known:
        return wanted
    suffixed = [column for column in known if column.endswith(f"__{name}")]
    if configured is None and len(suffixed) == 1:
        return suffixed[0]
    raise TrainingSetError(
        f"The reference has no column '{wanted}' for the graph's input '{name}'.{did_you_mean(wanted, known)} Name it "
        f"with `+columns.{name}=<column>`."
    )


def _input(
    table: pa.Table, name: str, one: GraphInput, config: RegisterConfig, artifact: Artifact
) -> InputSpec:
    column = table[name]
    dtype = value_type(column)
    if one.type == TEXT:
        if not is_text(dtype):
            raise TrainingSetError(
                f"The graph takes '{one.name}' as texts, and column '{name}' of the reference is {dtype}."
            )
        return InputSpec(name=name, dtype="string", categories=_categories(column, name, config, artifact))
    if str(dtype) not in NUMERIC:
        raise TrainingSetError(
            f"The graph takes '{one.name}' as {one.type_name}, and column '{name}' of the reference is {dtype}."
        )
    return InputSpec(name=name, dtype=str(dtype))


def _categories(
    column: pa.ChunkedArray, name: str, config: RegisterConfig, artifact: Artifact
) -> tuple[Label, ...]:
    """Return the texts of the reference and of the graph's lists that have one of them.

    A text outside this list would reach the graph as a missing value. The graph itself decides what it does with a text
    that it does not know, so a list that belongs to another input does no harm.
    """
    values = set(pc.unique(column.cast(pa.string()).drop_null()).to_pylist())
    known = values.union(*(texts for texts in artifact.texts if not values.isdisjoint(texts)))
    if len(known) > config.max_categories:
        raise TrainingSetError(
            f"Input '{name}' has {len(known)} categories, more than {config.max_categories}. Raise max_categories if "
            "it is no identifier."
        )
    return tuple(sorted(known))


def _classes(config: RegisterConfig, artifact: Artifact, source: TrainingSet) -> tuple[Label, ...] | None:
    if config.task is Task.regression:
        return None
    if artifact.classes is None:
        return learn_classes(config.task, label_column(source.table, config.label), label=config.label)
    if config.task is Task.binary and len(artifact.classes) != 2:
        raise TrainingSetError(
            f"The graph has {len(artifact.classes)} classes: {', '.join(map(repr, artifact.classes))}. Set "
            "task=multiclass."
        )
    return _as_labels(artifact.classes, source, config.label)


def _as_labels(classes: tuple[Label, ...], source: TrainingSet, label: str) -> tuple[Label, ...]:
    """Return the graph's classes with the type of the label: a graph has no booleans, only 0 and 1."""
    is_flag = pa.types.is_boolean(value_type(label_column(source.table, label)))
    return tuple(bool(one) for one in classes) if is_flag and set(classes) <= {0, 1} else classes
