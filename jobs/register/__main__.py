"""`python -m jobs.register name=m artifact=model.onnx reference=rows.parquet label=y`: register an ONNX graph.

A default export of scikit-learn by skl2onnx is registered as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pyarrow as pa

from cluster.entrypoint import job
from cluster.errors import RefusedError, TrainingSetError, did_you_mean
from cluster.ledger import open_ledger
from cluster.registry import Lineage, Registry
from cluster.runtime import Model, ModelSignature, Precision, Predictions, Task, open_model
from cluster.runtime.device_choice import Hardware
from cluster.runtime.encoding import Matrix, encode
from cluster.runtime.model import NoScoreForMissingValues
from cluster.runtime.predictions import check_scores
from cluster.runtime.signature import ONNX_FILE, SIGNATURE_FILE
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.storage import exists, json_text, layout, local, read_bytes, resolve
from jobs.metrics import headline, score
from jobs.parity import MAX_INT8, compare_scores, require_parity
from jobs.register.adapt import adapt
from jobs.register.artifact import Artifact, read_artifact
from jobs.register.compare import artifact_scores, comparable_rows
from jobs.register.config import RegisterConfig
from jobs.register.fills import fill_warning, typical_values, whole_positions
from jobs.register.signature import graph_columns, read_signature
from jobs.train.data import TrainingSet, read_training_set
from jobs.train.rows.target import encode_target, label_column
from jobs.train.run.lineage import to_json_values
from jobs.train.version_rows import ALL_ROWS

FAMILY = "onnx"
TWO_THREADS = Hardware(num_threads=2)


@job("register", RegisterConfig, timed=True)
def main(config: RegisterConfig) -> dict[str, Any]:
    """Register one version."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.register")
    resource = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.register_model, resource)
    places = layout(config.storage)
    artifact = read_file(config)
    source = read_training_set(config.reference, protected_files(actor.access), places=places, ledger=ledger)
    with scratch_directory(memory_folder(otherwise=local(places.runs))) as folder:
        prepared = prepare(config, artifact, source, folder)
        for warning in prepared.warnings:
            print(f"warning: {warning}", flush=True)
        version = Registry(ledger, places).register(
            folder,
            name=config.name,
            family=FAMILY,
            task=config.task.value,
            lineage=lineage(config, artifact, source),
            metrics=prepared.metrics,
            warnings=prepared.warnings,
            store=key_store(actor.access),
            actor=actor.name,
        )
    difference = prepared.metrics["parity"]["largest_score_difference"]
    print(
        f"registered {version.name} version {version.version} {headline(config.task, prepared.metrics)} on the "
        f"reference; scores differ from the artifact's by at most {difference:.2g}"
    )
    return {"name": version.name, "version": version.version, "metrics": prepared.metrics}


class PreparedModel(NamedTuple):
    """What is known of a model whose files are ready to be registered."""

    signature: ModelSignature
    metrics: dict[str, Any]
    """Metrics on the reference rows, and `parity` with the artifact."""
    warnings: list[str]


def read_file(config: RegisterConfig) -> Artifact:
    """Read the artifact.

    Raises:
        RefusedError: There is no such file, or it is not a graph that can be registered.
    """
    uri = resolve(config.artifact)
    if not uri.endswith(".onnx"):
        raise RefusedError(
            f"artifact={config.artifact} is no ONNX file (.onnx). Other formats could run code."
        )
    if not exists(uri):
        raise RefusedError(f"No artifact at {uri}.")
    return read_artifact(read_bytes(uri), path=config.artifact, scores=config.scores)


def prepare(config: RegisterConfig, artifact: Artifact, source: TrainingSet, folder: Path) -> PreparedModel:
    """Write the model's files into an empty folder, and compare their scores with the artifact's.

    Raises:
        TrainingSetError: The reference does not fit the graph.
        RefusedError: The scores do not fit the task, or differ from the artifact's.
    """
    signature = read_signature(config, artifact, source)
    matrix = encode(signature, source.table)
    model, fills = write_model_with_fills(folder, artifact, signature, matrix)
    columns = graph_columns(config, artifact, source)
    rows = comparable_rows(artifact, columns, source.table, fills=fills)
    compared = source.table.take(pa.array(rows))
    original = score_like_model(artifact_scores(artifact, columns, compared), signature)
    parity = require_like_artifact(config, model, compared, original, Precision.float32)
    if config.precision is Precision.int8:
        from jobs.train.quantise import quantise

        quantise(folder)
        model = reopen(folder, signature, Precision.int8)
        parity = require_like_artifact(config, model, compared, original, Precision.int8)
    predictions = model.predict_matrix(matrix)
    check_scores(predictions)
    if config.expected is not None:
        require_expected_scores(config, predictions, source.table)
    target = encode_target(
        signature.task,
        label_column(source.table, signature.label),
        classes=signature.classes,
        label=signature.label,
    )
    warnings = [
        *fill_warning(fills, signature),
        "the metrics are those of the reference rows, which the fit may have seen",
    ]
    metrics = score(predictions, target) | {"parity": parity}
    (folder / "metrics.json").write_text(json_text(metrics))
    return PreparedModel(model.signature, metrics, warnings)


def write_model_with_fills(
    folder: Path, artifact: Artifact, signature: ModelSignature, matrix: Matrix
) -> tuple[Model, dict[int, float]]:
    """Write the wrapped graph with as few fills as it needs, and return the model and the fills.

    Texts are filled last, because most encoders ignore an unknown text, and a fill would hide it from them.

    Raises:
        NoScoreForMissingValues: The model gives no valid score for a row of missing values, even with fills.
    """
    whole, columns = whole_positions(artifact, signature), range(signature.width)
    numbers = [position for position in columns if signature.inputs[position].categories is None]
    for positions in (whole, numbers):
        fills = typical_values(matrix, signature, positions)
        try:
            return write_model(folder, artifact, signature, fills), fills
        except NoScoreForMissingValues:
            continue
    fills = typical_values(matrix, signature, list(columns))
    return write_model(folder, artifact, signature, fills), fills


def write_model(
    folder: Path, artifact: Artifact, signature: ModelSignature, fills: dict[int, float]
) -> Model:
    """Write the wrapped graph and its signature, and load both.

    Raises:
        NoScoreForMissingValues: The model gives no valid score for a row of missing values.
    """
    (folder / ONNX_FILE).write_bytes(adapt(artifact, signature, fills).SerializeToString())
    return reopen(folder, signature, Precision.float32)


def reopen(folder: Path, signature: ModelSignature, precision: Precision) -> Model:
    """Write the signature with a precision, and load the model."""
    (folder / SIGNATURE_FILE).write_text(replace(signature, precision=precision).to_json())
    return open_model(folder, hardware=TWO_THREADS)


def score_like_model(scores: Any, signature: ModelSignature) -> Any:
    """Return the artifact's scores in the shape of `Predictions`: of two classes, only the second one's."""
    is_pair = signature.task is Task.binary and scores.ndim == 2 and scores.shape[1] == 2
    return scores[:, 1] if is_pair else scores


def require_like_artifact(
    config: RegisterConfig, model: Model, rows: pa.Table, original: Any, precision: Precision
) -> dict[str, Any]:
    """Return how far the registered model's scores differ from the artifact's.

    Raises:
        RefusedError: They differ too much, or have another shape.
    """
    predictions: Predictions = model.predict(rows)
    if not len(original):
        raise RefusedError(
            "No reference row has all values, so the model cannot be compared with the artifact."
        )
    if original.shape != predictions.scores.shape:
        raise RefusedError(
            f"The artifact gives scores of shape {list(original.shape)}, which do not fit task={config.task.value}."
        )
    parity = compare_scores(
        original,
        predictions.scores,
        precision=precision,
        is_number=config.task is Task.regression,
        bound=config.max_difference if precision is Precision.float32 else MAX_INT8,
    )
    require_parity(parity, model=f"'{config.artifact}'")
    return parity


def require_expected_scores(config: RegisterConfig, predictions: Predictions, table: pa.Table) -> None:
    """Require the scores that the original model gave for the reference rows, before it was exported.

    Raises:
        TrainingSetError: The reference has no such column of numbers.
        RefusedError: The scores differ too much. Then the export changed the model.
    """
    assert config.expected is not None
    if config.expected not in table.column_names:
        raise TrainingSetError(
            f"The reference has no column '{config.expected}' with the original scores."
            f"{did_you_mean(config.expected, table.column_names)}"
        )
    if config.task is Task.multiclass:
        raise TrainingSetError(
            "`expected` is one score a row, so it does not fit task=multiclass. Leave it out."
        )
    column = table[config.expected]
    if not pa.types.is_floating(column.type) or column.null_count:
        raise TrainingSetError(f"Column '{config.expected}' must have a number in each row, for `expected`.")
    difference = compare_scores(
        column.cast(pa.float64()).to_numpy(),
        predictions.scores,
        precision=predictions.signature.precision,
        is_number=config.task is Task.regression,
        bound=config.max_difference if config.precision is Precision.float32 else MAX_INT8,
    )
    require_parity(difference, model=f"'{config.artifact}'")


def lineage(config: RegisterConfig, artifact: Artifact, source: TrainingSet) -> Lineage:
    """Return the lineage: the artifact and its reference. How it was fitted is not known here."""
    manifest = source.manifest
    settings = {
        name: to_json_values(getattr(config, name)) for name in ("name", "task", "label", "inputs", "columns")
    }
    return Lineage(
        training_set_hash=source.hash,
        table_versions=manifest.get("table_versions", {}),
        service=manifest.get("service", ""),
        service_version=manifest.get("service_version", ""),
        config=settings
        | {
            "training_set": config.reference,
            "rows": ALL_ROWS,
            "artifact": {
                "file": config.artifact,
                "sha256": hashlib.sha256(artifact.data).hexdigest(),
                "producer": f"{artifact.tensor_model.producer_name} {artifact.tensor_model.producer_version}".strip(),
                "onnx": onnx.__version__,
            },
        },
    )


if __name__ == "__main__":
    main()
