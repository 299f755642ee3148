"""A model version's lineage as OpenLineage run events (specification 2-0-2), with column lineage.

A run for each step that the ledger knows: each ingestion, the training set, the training, each deployment. The
specification wants a START and a COMPLETE; the ledger knows when a step was done, so both bear that time. Ids follow
from the ledger entries' hashes: exporting twice tells the same runs again and no new ones.
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
"""What stands for the one column that a model has."""

Json = dict[str, Any]


def run_events(found: ModelTrace, *, namespace: str) -> Iterator[Json]:
    """The events of all steps, in the order of the ledger.

    Args:
        found: the trace of a model version.
        namespace: of jobs and data sets.
    """
    for entry in found.batches:
        yield from _ingestion(
            entry, [one for one in found.columns if one.view == entry.payload["view"]], namespace
        )
    training: list[Json] = []
    if found.built is not None:
        training = [_dataset(namespace, f"training_sets/{found.built.payload['row_hash']}")]
        yield from _join(found, found.built, namespace)
    model = _dataset(namespace, _model(found))
    fields = {PREDICTION: [_input(training[0], one.column) for one in found.columns]} if training else {}
    yield from _event(
        found.registered, namespace, "jobs.train", training, [model | _lineage(fields, "TRANSFORMATION")]
    )
    for entry in found.deployments:
        app = _dataset(namespace, f"apps/{entry.payload['app']}")
        served = _lineage({PREDICTION: [_input(model, PREDICTION)]}, "IDENTITY")
        yield from _event(entry, namespace, "serve_apps.deploy", [model], [app | served])


def _ingestion(entry: Entry, columns: list[Column], namespace: str) -> list[Json]:
    known = entry.payload.get("source_columns") or [ALL]
    view, name = entry.payload["view"], columns[0].source if columns else entry.payload["source"]
    source = _dataset(namespace, name)
    fields = {
        one.feature: [
            _input(source, column)
            for column in (known if one.source_columns == (ALL,) else one.source_columns)
        ]
        for one in columns
    }
    plain = all(one.transform is None for one in columns)
    table = _table(namespace, view, entry.payload["table_version"])
    table["facets"] |= _lineage(fields, "IDENTITY" if plain else "TRANSFORMATION")["facets"]
    return _event(entry, namespace, f"feature_jobs.ingest.{view}", [source], [table])


def _join(found: ModelTrace, built: Entry, namespace: str) -> list[Json]:
    tables = {
        view: _table(namespace, view, version) for view, version in built.payload["table_versions"].items()
    }
    fields = {one.column: [_input(tables[one.view], one.feature)] for one in found.columns}
    output = _dataset(namespace, f"training_sets/{built.payload['row_hash']}") | _lineage(fields, "IDENTITY")
    job = f"feature_jobs.training_set.{built.payload['service']}"
    return _event(built, namespace, job, list(tables.values()), [output])


def _event(
    entry: Entry, namespace: str, job: str, inputs: Iterable[Json], outputs: Iterable[Json]
) -> list[Json]:
    common = {
        "eventTime": entry.time,
        "run": {"runId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}:{entry.hash}"))},
        "job": {"namespace": namespace, "name": job},
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
    }
    done = {"eventType": "COMPLETE", "inputs": list(inputs), "outputs": list(outputs)}
    return [common | {"eventType": "START", "inputs": [], "outputs": []}, common | done]


def _model(found: ModelTrace) -> str:
    return f"models/{found.model}/{found.version}"


def _dataset(namespace: str, name: str) -> Json:
    return {"namespace": namespace, "name": name}


def _table(namespace: str, view: str, version: int) -> Json:
    facet = {"_producer": PRODUCER, "_schemaURL": DATASET_VERSION, "datasetVersion": str(version)}
    return _dataset(namespace, f"features/{view}") | {"facets": {"version": facet}}


def _input(dataset: Json, column: str) -> Json:
    return {"namespace": dataset["namespace"], "name": dataset["name"], "field": column}


def _lineage(fields: dict[str, list[Json]], subtype: str) -> Json:
    made = [{"type": "DIRECT", "subtype": subtype}]
    facet = {
        "_producer": PRODUCER,
        "_schemaURL": COLUMN_LINEAGE,
        "fields": {
            name: {"inputFields": [one | {"transformations": made} for one in inputs]}
            for name, inputs in fields.items()
        },
    }
    return {"facets": {"columnLineage": facet}}
