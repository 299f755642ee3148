"""`python -m feature_jobs.training_set service=s entities=e.parquet output=o.parquet`: features as they were known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from cluster.entrypoint import job
from cluster.errors import TrainingSetError
from cluster.ledger import open_ledger
from cluster.ledger.events import TrainingSetBuilt
from cluster.security.acting import act
from cluster.security.keys.access import KeyAccess, protected_files
from cluster.security.policy import Action
from cluster.session import attach, require_record
from cluster.settings import PlatformConfig
from cluster.storage import Layout, exists, layout, read_parquet, resolve, write_bytes, write_parquet
from feature_jobs.store.catalog import ServiceSpec, ViewSpec, service_spec
from feature_jobs.store.offline import Snapshot, snapshot
from feature_jobs.store.protection import training_set_protection, view_protection, view_resources
from feature_jobs.store.row_hash import row_hash
from feature_jobs.store.training_set import (
    Built,
    Joined,
    JoinParts,
    Part,
    assemble,
    join_bucket,
    join_here,
)


@dataclass(kw_only=True, slots=True)
class TrainingSetConfig(PlatformConfig):
    """What is joined."""

    definitions: str = "feature_jobs.census"
    """Named for symmetry with the other commands: the service is read as it was applied."""
    service: str = "???"
    entities: str = "???"
    """Parquet with join keys and `event_timestamp`; other columns, a label for one, pass through."""
    output: str = "???"
    """Parquet to write; its manifest lies beside it."""
    task_rows: int = 3_000_000
    """Entity and feature rows of a view above which each bucket is a Ray task."""
    cutoff: bool = True
    """Leave out what was created after an entity row's time; false goes by the event's time alone."""


@job("training_set", TrainingSetConfig)
def main(config: TrainingSetConfig) -> None:
    """Build a training set and its manifest."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.training_set")
    access, places = actor.access, layout(config.storage)
    spec = service_spec(ledger, config.service)
    for view in spec.views:
        actor.check(Action.build_training_set, *view_resources(view, region=config.cluster.region))
    entities = read_entities(config.entities)
    snapshots = {
        view.name: snapshot(
            places.features(view.name),
            view=view.name,
            keys=view.join_keys,
            protection=view_protection(view),
            access=access,
        )
        for view in spec.views
    }
    largest = entities.num_rows + max(pinned.rows for pinned in snapshots.values())
    join_parts: JoinParts = join_here
    if largest > config.task_rows:
        attach(config)
        join_parts = join_in_tasks
    built = assemble(spec, snapshots, entities, join_parts=join_parts, cutoff=config.cutoff)
    table = built.table
    output = resolve(config.output)
    write(table, output, spec, places=places, access=access)
    manifest = describe(spec, snapshots, entities, built, cutoff=config.cutoff)
    if any(built.hidden.values()):
        print(hidden_warning(manifest["hidden_share"]))
    event = TrainingSetBuilt(
        service=spec.name,
        service_version=spec.version,
        rows=table.num_rows,
        row_hash=manifest["row_hash"],
        entities_hash=manifest["entities_hash"],
        table_versions=manifest["table_versions"],
        view_versions=manifest["view_versions"],
        output=output.rsplit("/", 1)[-1],
    )
    seq = ledger.append(event, actor=actor.name).seq
    write_bytes(manifest_path(output), json.dumps(manifest | {"seq": seq}, indent=1).encode())
    short = manifest["row_hash"][:16]
    print(f"training set {spec.name}: {table.num_rows} rows, {len(spec.columns)} features, hash {short}")


def write(table: pa.Table, output: str, spec: ServiceSpec, *, places: Layout, access: KeyAccess) -> None:
    """Write the rows: protected below the storage root, in the clear where the caller takes them out of it."""
    if output.startswith(f"{places.root}/"):
        protected_files(access).write(table, output, training_set_protection(spec))
    else:
        write_parquet(table, output)


def manifest_path(output: str) -> str:
    """Where a training set's manifest lies."""
    return f"{output.removesuffix('.parquet')}.manifest.json"


def read_entities(path: str) -> pa.Table:
    """The entity rows.

    Raises:
        TrainingSetError: there is no such file, it is no Parquet, or it has no rows.
    """
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(f"No entity rows at {uri}. Give a Parquet file with `entities=…`.")
    try:
        table = read_parquet(uri)
    except pa.ArrowException as error:
        raise TrainingSetError(f"{uri} cannot be read as Parquet: {error}") from error
    if table.num_rows == 0:
        raise TrainingSetError(f"{uri} has no rows.")
    return table


def hidden_warning(shares: dict[str, float]) -> str:
    """What the cutoff costs, in one line."""
    said = ", ".join(f"{share:.2%} of '{view}'" for view, share in shares.items())
    return (
        f"warning: {said}: entity rows that have no values only because none was known yet at their time "
        "(created_timestamp). `cutoff=false` goes by the event's time alone."
    )


def describe(
    spec: ServiceSpec, snapshots: dict[str, Snapshot], entities: pa.Table, built: Built, *, cutoff: bool
) -> dict[str, Any]:
    """The manifest: all that is needed to build the same rows again and to know that they are the same."""
    table = built.table
    columns = [
        {
            "name": name,
            "dtype": field.dtype,
            "categorical": field.categorical or field.dtype == "string",
            "view": view.name,
            "feature": field.name,
        }
        for view in spec.views
        for name, field in zip(view.columns, view.fields, strict=True)
    ]
    return {
        "service": spec.name,
        "service_version": spec.version,
        "view_versions": {view.name: view.version for view in spec.views},
        "table_versions": {name: pinned.version for name, pinned in snapshots.items()},
        "entities_hash": row_hash(entities),
        "row_hash": row_hash(table),
        "rows": table.num_rows,
        "columns": columns,
        "cutoff": cutoff,
        "hidden_share": {view: count / table.num_rows for view, count in built.hidden.items()},
        "null_share": {name: table[name].null_count / table.num_rows for name in spec.columns},
    }


def join_in_tasks(pinned: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool) -> list[Joined]:
    """Join each bucket in a Ray task of its own."""
    return ray.get([_join_bucket.remote(pinned, view, part, cutoff) for part in parts])


@ray.remote
def _join_bucket(pinned: Snapshot, view: ViewSpec, part: Part, cutoff: bool) -> Joined:
    return join_bucket(pinned, view, part, cutoff)


if __name__ == "__main__":
    main()
