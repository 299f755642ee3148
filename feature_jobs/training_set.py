"""`python -m feature_jobs.training_set service=s entities=e.parquet output=o.parquet`: build a training set.

Each entity row gets the feature values that were known at its time. With `manifest=x.manifest.json` instead of a
service, the rows of an earlier training set are built again, from the definitions, table versions and cutoff in the
manifest. Later ingestion, compaction or key rotation does not change the result.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import Inconsistent, TrainingSetError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import TrainingSetBuilt
from cluster.placement import Selector, find_nodes, options
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from cluster.session import attach, require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import Layout, exists, layout, read_parquet, resolve, write_bytes, write_parquet
from feature_jobs.store.catalog.lifecycle import read_lifecycles, require_not_retired
from feature_jobs.store.catalog.protection import training_set_protection, view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec, service_spec
from feature_jobs.store.offline.bucket_join import JoinedBucket, join_bucket
from feature_jobs.store.offline.manifest import (
    Manifest,
    manifest_content,
    read_manifest,
    require_files,
    require_reproducible,
)
from feature_jobs.store.offline.row_hash import has_row_hash, row_hash
from feature_jobs.store.offline.stored_training_set import training_set_aad
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import (
    REMOTE_THREADS,
    THREADS,
    JoinParts,
    Part,
    assemble,
    join_in_process,
)
from feature_jobs.store.types.schema import EVENT
from feature_jobs.view_tables import view_snapshot

TASK_ROWS = 3_000_000
ROW_GROUP_ROWS = 65_536
"""Rows of a row group. Training reads a training set row group by row group."""


@dataclass(kw_only=True, slots=True)
class TrainingSetConfig(PlatformConfig):
    """Configuration of `feature_jobs.training_set`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The service is read from the ledger."""
    service: str | None = None
    """Name of the feature service, for a new training set."""
    manifest: str | None = None
    """Manifest of a training set to build again, instead of a service."""
    entities: str | None = None
    """Parquet file with join keys and `event_timestamp`. Other columns, for example a label, are copied. With a
    manifest, the default is the path in the manifest."""
    output: str = "???"
    """Parquet file to write. The manifest is written beside it."""
    task_rows: int | None = None
    """If the entity rows and the rows of the largest view are more than this, each bucket is joined in a Ray task. The
    default is 3 million if the cluster has more than four cores. On a smaller one the command's threads use them all,
    so there are no tasks."""
    cutoff: bool = True
    """Leave out values that were created after an entity row's time; false uses only the event time. With a manifest,
    the cutoff in the manifest is used."""
    versions: dict[str, int] = field(default_factory=dict)
    """View to table version; the default is the newest version. With a manifest, its versions are used."""

    def __post_init__(self) -> None:
        if self.manifest is not None and self.versions:
            raise ValueError("A manifest contains the table versions to read. Leave out versions.")
        if (self.service is None) == (self.manifest is None):
            raise ValueError("Give service=… for a new training set, or manifest=… for one to build again.")
        if self.service is not None and self.entities is None:
            raise ValueError("Give entities=…, a Parquet file with join keys and event_timestamp.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A training set to build."""

    spec: ServiceSpec
    entities: str | None
    """Path of the entity rows; None if they are in memory."""
    cutoff: bool
    versions: dict[str, int]
    """Table version to read, by view; the newest for all other views."""
    original: Manifest | None = None
    """Manifest of the training set that is built again."""


@job("training_set", TrainingSetConfig, timed=True)
def main(config: TrainingSetConfig) -> dict[str, Any]:
    """Build a training set and its manifest."""
    if config.manifest is not None:
        refuse_unused(("cutoff",), by="manifest=…")
    ledger = open_ledger(config)
    actor = create_actor(
        config, require_running_cluster(config), ledger, entrypoint="feature_jobs.training_set"
    )
    request = load_request(config, ledger)
    for view in request.spec.views:
        actor.check(Action.build_training_set, *view_resources(view, region=config.cluster.region))
    if request.original is None:
        views = [view.name for view in request.spec.views]
        require_not_retired(read_lifecycles(ledger), views, doing="No new training set is built.")
    manifest = build_training_set(config, request, ledger, access=actor.access, actor=actor.name)
    if any(manifest["hidden_share"].values()):
        print(hidden_warning(manifest["hidden_share"]))
    print(
        f"training set {manifest['service']}: {manifest['rows']} rows, {len(manifest['columns'])} features, "
        f"hash {manifest['row_hash'][:16]}"
    )
    return {name: manifest[name] for name in ("service", "rows", "row_hash", "hidden_share")}


def build_training_set(
    config: TrainingSetConfig, request: Request, ledger: Ledger, *, access: KeyAccess, actor: str
) -> dict[str, Any]:
    """Build a training set, write its rows and manifest, append an event, and return the manifest.

    Raises:
        TrainingSetError: the entity rows cannot be joined, or are not those of the original training set.
        Inconsistent: the result is not the same as in the original manifest; nothing was written.
    """
    original, places = request.original, layout(config.storage)
    entities = read_entities(str(request.entities))
    if EVENT in entities.column_names and getattr(entities[EVENT].type, "tz", "") is None:
        print(f"note: '{EVENT}' of the entity rows has no zone and is taken as UTC")
    entities_hash = row_hash(entities)
    if original is not None and not has_row_hash(entities, original.entities_hash):
        raise TrainingSetError(
            f"The entity rows at {resolve(str(request.entities))} are not those of {original.path}: their hash is "
            f"{entities_hash[:16]}, not {original.entities_hash[:16]}. Give the same file with `entities=…`."
        )
    table, manifest = join_entities(config, request, entities, entities_hash, access=access)
    if original is not None:
        require_same_rows(original, table)
    output = resolve(config.output)
    write_training_set(table, output, request.spec, places=places, access=access)
    manifest["seq"] = ledger.append(built_event(manifest, output, original), actor=actor).seq
    write_bytes(manifest_path(output), json.dumps(manifest, indent=1).encode())
    return manifest


def join_entities(
    config: TrainingSetConfig, request: Request, entities: pa.Table, entities_hash: str, *, access: KeyAccess
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the training set's rows, and its manifest without `seq`.

    Raises:
        TrainingSetError: the entity rows cannot be joined, or a view has no rows.
    """
    spec = request.spec
    snapshots = pinned_tables(request, layout(config.storage), access)
    join_parts = choose_join(config, entities, snapshots)
    built = assemble(spec, snapshots, entities, join_parts=join_parts, cutoff=request.cutoff)
    manifest = manifest_content(
        spec,
        snapshots,
        built,
        entities=request.entities,
        entities_hash=entities_hash,
        row_hash=row_hash(built.table),
        cutoff=request.cutoff,
    )
    return built.table, manifest


def load_request(config: TrainingSetConfig, ledger: Ledger) -> Request:
    """Return the request for a service's newest version, or for the contents of a manifest.

    Raises:
        TrainingSetError: the manifest cannot be built again, or `versions` names a view that the service does not have.
        FeatureServiceNotFound: no service with this name was applied.
    """
    if config.manifest is None:
        spec = service_spec(ledger, str(config.service))
        known = [view.name for view in spec.views]
        if unknown := [name for name in config.versions if name not in known]:
            raise TrainingSetError(
                f"Service '{spec.name}' has no view '{unknown[0]}'.{did_you_mean(unknown[0], known)}"
            )
        return Request(
            spec=spec, entities=str(config.entities), cutoff=config.cutoff, versions=config.versions
        )
    manifest = read_manifest(config.manifest)
    require_reproducible(manifest, ledger)
    entities = config.entities or manifest.entities
    if entities is None:
        raise TrainingSetError(
            f"{manifest.path} does not contain the path of its entity rows. Give `entities=…`."
        )
    spec = service_spec(ledger, manifest.service, manifest.service_version)
    return Request(
        spec=spec,
        entities=entities,
        cutoff=manifest.cutoff,
        versions=manifest.table_versions,
        original=manifest,
    )


def pinned_tables(request: Request, places: Layout, access: KeyAccess) -> dict[str, Snapshot]:
    """Return a snapshot of each view's table, at the requested version.

    Raises:
        TrainingSetError: a view has no rows, or files of the requested version were removed.
    """
    views = request.spec.views

    def pin(view: ViewSpec) -> Snapshot:
        return view_snapshot(view, places, access, version=request.versions.get(view.name))

    # Reading a table's log from an object store is a sequence of short requests.
    with ThreadPoolExecutor(REMOTE_THREADS) as threads:
        snapshots = dict(zip((view.name for view in views), threads.map(pin, views), strict=True))
    for name in request.versions:
        require_files(snapshots[name], name)
    return snapshots


def choose_join(config: TrainingSetConfig, entities: pa.Table, snapshots: dict[str, Snapshot]) -> JoinParts:
    """Return the join function: `join_in_process` for few rows or few cores, else `join_in_tasks`."""
    largest = entities.num_rows + max(pinned.rows for pinned in snapshots.values())
    limit = TASK_ROWS if config.task_rows is None else config.task_rows
    if largest <= limit:
        return join_in_process
    attach(config)
    selector = find_nodes(config.placement)
    if config.task_rows is None and not selector and num_cores() <= THREADS:
        return join_in_process
    return functools.partial(join_in_tasks, selector=selector)


def num_cores() -> float:
    """Return the number of cores of the cluster. This process must be attached to it."""
    import ray  # imported only for large work

    return float(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


def require_same_rows(original: Manifest, table: pa.Table) -> None:
    """Refuse rows that differ from the original manifest's rows.

    Raises:
        Inconsistent: the rows differ, although all their inputs are unchanged.
    """
    if not has_row_hash(table, original.row_hash):
        raise Inconsistent(
            f"Built again from {original.path} the rows have hash {row_hash(table)[:16]}, "
            f"not {original.row_hash[:16]}. Nothing was written. Compare the tables' files with a backup."
        )


def built_event(manifest: dict[str, Any], output: str, original: Manifest | None) -> TrainingSetBuilt:
    """Return the event for a training set."""
    return TrainingSetBuilt(
        service=manifest["service"],
        service_version=manifest["service_version"],
        rows=manifest["rows"],
        row_hash=manifest["row_hash"],
        entities_hash=manifest["entities_hash"],
        table_versions=manifest["table_versions"],
        view_versions=manifest["view_versions"],
        output=output.rsplit("/", 1)[-1],
        cutoff=manifest["cutoff"],
        rebuilt_from=None if original is None else original.seq,
    )


def write_training_set(
    table: pa.Table, output: str, spec: ServiceSpec, *, places: Layout, access: KeyAccess
) -> None:
    """Write the rows. They are encrypted only if the path is below the storage root."""
    place = training_set_aad(output, places)
    if place is not None:
        protected_files(access).write(
            table, output, training_set_protection(spec), place=place, row_group_rows=ROW_GROUP_ROWS
        )
    else:
        write_parquet(table, output, row_group_rows=ROW_GROUP_ROWS)


def manifest_path(output: str) -> str:
    """Return the path of a training set's manifest."""
    return f"{output.removesuffix('.parquet')}.manifest.json"


def read_entities(path: str) -> pa.Table:
    """Read the entity rows.

    Raises:
        TrainingSetError: the file is missing, is a folder, is not Parquet, or has no rows.
    """
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(f"No entity rows at {uri}. Give a Parquet file with `entities=…`.")
    try:
        table = read_parquet(uri)
    except IsADirectoryError as error:
        raise TrainingSetError(f"{uri} is a folder. Give one Parquet file with `entities=…`.") from error
    except pa.ArrowException as error:
        raise TrainingSetError(f"{uri} cannot be read as Parquet: {error}") from error
    if table.num_rows == 0:
        raise TrainingSetError(f"{uri} has no rows.")
    return table


def hidden_warning(shares: dict[str, float]) -> str:
    """Return one line with the share of rows that get null because of the cutoff."""
    parts = ", ".join(f"{share:.2%} of the rows for '{view}'" for view, share in shares.items())
    return (
        f"warning: entity rows get null because a value was created only after their time: {parts}. "
        "`cutoff=false` ignores created_timestamp."
    )


def join_in_tasks(
    pinned: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool, *, selector: Selector
) -> list[JoinedBucket]:
    """Join each bucket in its own Ray task, on nodes with these labels."""
    import ray  # imported only for large work

    task = ray.remote(join_bucket).options(**options(selector))
    return ray.get([task.remote(pinned, view, *part, cutoff) for part in parts])


if __name__ == "__main__":
    main()
