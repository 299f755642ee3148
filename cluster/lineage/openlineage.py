"""A model version's lineage as OpenLineage run events, with column lineage.

Each step in the ledger becomes a run: each ingestion, the training set, the training, and each deployment. The
specification requires a START and a COMPLETE event. The ledger knows only when a step was done, so both events have
that time. Run ids are derived from the hashes of the ledger entries, so a second export gives the same runs.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence

from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.generated.base import DatasetFacet
from openlineage.client.generated.column_lineage_dataset import (
    ColumnLineageDatasetFacet,
    Fields,
    InputField,
    Transformation,
)
from openlineage.client.generated.dataset_version_dataset import DatasetVersionDatasetFacet

from cluster.ledger.chain import Entry
from cluster.lineage.trace import ALL, Column, ModelTrace

PRODUCER = "urn:falaj"
PREDICTION = "prediction"
"""Name of the only column that a model or a Serve application has in the column lineage."""
IDENTITY, TRANSFORMATION = "IDENTITY", "TRANSFORMATION"


def run_events(trace: ModelTrace, *, namespace: str) -> Iterator[RunEvent]:
    """Yield the events of all steps, in the order of the ledger.

    Args:
        trace: Lineage of a model version.
        namespace: Namespace of jobs and data sets.
    """
    return _RunEvents(namespace).of_model(trace)


class _RunEvents:
    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def of_model(self, trace: ModelTrace) -> Iterator[RunEvent]:
        for entry in trace.batches:
            columns = [column for column in trace.columns if column.view == entry.payload["view"]]
            yield from self._ingestion(entry, columns)
        training_sets: list[str] = []
        if trace.training_set is not None:
            training_sets = [f"training_sets/{trace.training_set.payload['row_hash']}"]
            yield from self._join(trace.training_set, trace.columns, training_sets[0])
        model = f"models/{trace.model}/{trace.version}"
        inputs = [(name, column.column) for name in training_sets for column in trace.columns]
        yield from self._run(
            trace.registered,
            "jobs.train",
            [self._input(name) for name in training_sets],
            self._output(model, {PREDICTION: inputs} if training_sets else {}, TRANSFORMATION),
        )
        for entry in trace.deployments:
            app = self._output(f"apps/{entry.payload['app']}", {PREDICTION: [(model, PREDICTION)]}, IDENTITY)
            yield from self._run(entry, "serve_apps.deploy", [self._input(model)], app)

    def _ingestion(self, entry: Entry, columns: Sequence[Column]) -> Iterator[RunEvent]:
        all_columns = entry.payload.get("source_columns") or [ALL]
        view, source = entry.payload["view"], columns[0].source if columns else entry.payload["source"]
        fields = {
            column.feature: [
                (source, name)
                for name in (all_columns if column.source_columns == (ALL,) else column.source_columns)
            ]
            for column in columns
        }
        is_copy = all(column.transform is None for column in columns)
        table = self._output(f"features/{view}", fields, IDENTITY if is_copy else TRANSFORMATION)
        table.facets = (table.facets or {}) | _version(entry.payload["table_version"])
        yield from self._run(entry, f"feature_jobs.ingest.{view}", [self._input(source)], table)

    def _join(self, built: Entry, columns: Sequence[Column], training_set: str) -> Iterator[RunEvent]:
        tables = [
            self._input(f"features/{view}", _version(version))
            for view, version in built.payload["table_versions"].items()
        ]
        fields = {column.column: [(f"features/{column.view}", column.feature)] for column in columns}
        job = f"feature_jobs.training_set.{built.payload['service']}"
        yield from self._run(built, job, tables, self._output(training_set, fields, IDENTITY))

    def _run(
        self, entry: Entry, job: str, inputs: list[InputDataset], output: OutputDataset
    ) -> Iterator[RunEvent]:
        """Yield the START and COMPLETE events of one step."""
        for state in (RunState.START, RunState.COMPLETE):
            done = state is RunState.COMPLETE
            yield RunEvent(
                eventTime=entry.time,
                producer=PRODUCER,
                eventType=state,
                run=Run(runId=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}:{entry.hash}"))),
                job=Job(namespace=self._namespace, name=job),
                inputs=inputs if done else [],
                outputs=[output] if done else [],
            )

    def _input(self, name: str, facets: dict[str, DatasetFacet] | None = None) -> InputDataset:
        return InputDataset(namespace=self._namespace, name=name, facets=facets or {})

    def _output(
        self, name: str, columns: Mapping[str, Sequence[tuple[str, str]]], subtype: str
    ) -> OutputDataset:
        """Return a data set. `columns` maps each of its columns to the (data set, column) pairs of the inputs."""
        made = [Transformation(type="DIRECT", subtype=subtype)]
        fields = {
            column: Fields(
                inputFields=[
                    InputField(namespace=self._namespace, name=source, field=field, transformations=made)
                    for source, field in inputs
                ]
            )
            for column, inputs in columns.items()
        }
        facet = ColumnLineageDatasetFacet(fields=fields, producer=PRODUCER)
        return OutputDataset(namespace=self._namespace, name=name, facets={"columnLineage": facet})


def _version(version: int) -> dict[str, DatasetFacet]:
    return {"version": DatasetVersionDatasetFacet(datasetVersion=str(version), producer=PRODUCER)}
