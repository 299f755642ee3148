"""A model version's lineage as OpenLineage run events (specification 2-0-2), with column lineage.

Each step in the ledger becomes a run: each ingestion, the training set, the training, and each deployment. The
specification requires a START and a COMPLETE event. The ledger knows only when a step was done, so both have that time.
Run ids are derived from the hashes of the ledger entries, so a second export gives the same runs.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.ledger.chain import Entry
from cluster.lineage.trace import ALL, Column, ModelTrace

PRODUCER = "urn:falaj"
SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
FACETS = "https://openlineage.io/spec/facets"
COLUMN_LINEAGE = f"{FACETS}/1-2-0/ColumnLineageDatasetFacet.json#/$defs/ColumnLineageDatasetFacet"
DATASET_VERSION = f"{FACETS}/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet"
PREDICTION = "prediction"
"""Name of the single column of a model."""

Json = dict[str, Any]


def run_events(trace: ModelTrace, *, namespace: str) -> Iterator[Json]:
    """Yield the events of all steps, in the order of the ledger.

    Args:
        trace: Lineage of a model version.
        namespace: Namespace of jobs and data sets.
    """
    for entry in trace.batches:
        columns = [column for column in trace.columns if column.view == entry.payload["view"]]
        yield from _ingestion_events(entry, columns, namespace)
    training_sets: list[Json] = []
    model_inputs: dict[str, list[Json]] = {}
    if trace.training_set is not None:
        training_set = _training_set(namespace, trace.training_set)
        training_sets = [training_set]
        model_inputs = {PREDICTION: [_input(training_set, column.column) for column in trace.columns]}
        yield from _join_events(trace, trace.training_set, namespace)
    model = _dataset(namespace, f"models/{trace.model}/{trace.version}")
    outputs = [model | _lineage(model_inputs, "TRANSFORMATION")]
    yield from _run(trace.registered, namespace, "jobs.train", training_sets, outputs)
    for entry in trace.deployments:
        app = _dataset(namespace, f"apps/{entry.payload['app']}")
        lineage = _lineage({PREDICTION: [_input(model, PREDICTION)]}, "IDENTITY")
        yield from _run(entry, namespace, "serve_apps.deploy", [model], [app | lineage])


def _ingestion_events(entry: Entry, columns: list[Column], namespace: str) -> list[Json]:
    all_columns = entry.payload.get("source_columns") or [ALL]
    view, name = entry.payload["view"], columns[0].source if columns else entry.payload["source"]
    source = _dataset(namespace, name)
    fields = {
        column.feature: [
            _input(source, source_column)
            for source_column in (all_columns if column.source_columns == (ALL,) else column.source_columns)
        ]
        for column in columns
    }
    is_copy = all(column.transform is None for column in columns)
    table = _table(namespace, view, entry.payload["table_version"])
    table["facets"] |= _lineage(fields, "IDENTITY" if is_copy else "TRANSFORMATION")["facets"]
    return _run(entry, namespace, f"feature_jobs.ingest.{view}", [source], [table])


def _join_events(trace: ModelTrace, built: Entry, namespace: str) -> list[Json]:
    tables = {
        view: _table(namespace, view, version) for view, version in built.payload["table_versions"].items()
    }
    fields = {column.column: [_input(tables[column.view], column.feature)] for column in trace.columns}
    output = _training_set(namespace, built) | _lineage(fields, "IDENTITY")
    job = f"feature_jobs.training_set.{built.payload['service']}"
    return _run(built, namespace, job, list(tables.values()), [output])


def _run(
    entry: Entry, namespace: str, job: str, inputs: Iterable[Json], outputs: Iterable[Json]
) -> list[Json]:
    """Return the START and COMPLETE events of one step."""
    common = {
        "eventTime": entry.time,
        "run": {"runId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}:{entry.hash}"))},
        "job": {"namespace": namespace, "name": job},
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
    }
    complete = {"eventType": "COMPLETE", "inputs": list(inputs), "outputs": list(outputs)}
    return [common | {"eventType": "START", "inputs": [], "outputs": []}, common | complete]


def _training_set(namespace: str, built: Entry) -> Json:
    return _dataset(namespace, f"training_sets/{built.payload['row_hash']}")


def _dataset(namespace: str, name: str) -> Json:
    return {"namespace": namespace, "name": name}


def _table(namespace: str, view: str, version: int) -> Json:
    facet = {"_producer": PRODUCER, "_schemaURL": DATASET_VERSION, "datasetVersion": str(version)}
    return _dataset(namespace, f"features/{view}") | {"facets": {"version": facet}}


def _input(dataset: Json, column: str) -> Json:
    return {"namespace": dataset["namespace"], "name": dataset["name"], "field": column}


def _lineage(fields: dict[str, list[Json]], subtype: str) -> Json:
    transformations = [{"type": "DIRECT", "subtype": subtype}]
    facet = {
        "_producer": PRODUCER,
        "_schemaURL": COLUMN_LINEAGE,
        "fields": {
            name: {"inputFields": [field | {"transformations": transformations} for field in inputs]}
            for name, inputs in fields.items()
        },
    }
    return {"facets": {"columnLineage": facet}}
