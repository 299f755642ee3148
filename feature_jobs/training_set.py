"""`python -m feature_jobs.training_set service=s entities=e.parquet output=o.parquet`: features as they were known.

With `manifest=x.manifest.json` in place of a service, the same rows once more: from the definitions, table versions and
cutoff that it pins, whatever was ingested, compacted or rotated since.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import Inconsistent, TrainingSetError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import TrainingSetBuilt
from cluster.security.acting import act
from cluster.security.authorization.policy import Action
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from cluster.session import attach, require_record
from cluster.settings import PlatformConfig
from cluster.storage import Layout, exists, layout, read_parquet, resolve, write_bytes, write_parquet
from feature_jobs.store.catalog.lifecycle import heed, read_lifecycles
from feature_jobs.store.catalog.protection import training_set_protection, view_protection, view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec, service_spec
from feature_jobs.store.offline.manifest import Manifest, check_files, check_manifest, describe, read_manifest
from feature_jobs.store.offline.row_hash import has_row_hash, row_hash
from feature_jobs.store.offline.stored_training_set import place_of
from feature_jobs.store.offline.tables import Snapshot, snapshot
from feature_jobs.store.offline.training_set import (
    Joined,
    JoinParts,
    Part,
    assemble,
    join_bucket,
    join_here,
)
from feature_jobs.store.types.schema import EVENT


@dataclass(kw_only=True, slots=True)
class TrainingSetConfig(PlatformConfig):
    """What is joined."""

    definitions: str = "feature_jobs.census"
    """Named for symmetry with the other commands: the service is read as it was applied."""
    service: str | None = None
    manifest: str | None = None
    """Of a training set to build again, in place of a service."""
    entities: str | None = None
    """Parquet with join keys and `event_timestamp`; other columns, a label for one, pass through. A manifest knows
    where its own were."""
    output: str = "???"
    """Parquet to write; its manifest lies beside it."""
    task_rows: int = 3_000_000
    """Entity and feature rows of a view above which each bucket is a Ray task."""
    cutoff: bool = True
    """Leave out what was created after an entity row's time; false goes by the event's time alone. A manifest says
    itself."""
    versions: dict[str, int] = field(default_factory=dict)
    """View to the version of its table that is read; the newest where a view is not named. A manifest says itself."""

    def __post_init__(self) -> None:
        if self.manifest is not None and self.versions:
            raise ValueError("A manifest says which table versions are read. Leave versions away.")
        if (self.service is None) == (self.manifest is None):
            raise ValueError("Give service=… for a new training set, or manifest=… for one to build again.")
        if self.service is not None and self.entities is None:
            raise ValueError("Give entities=…, a Parquet file with join keys and event_timestamp.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is built."""

    spec: ServiceSpec
    entities: str | None
    """Where the entity rows are; none where they are in memory."""
    cutoff: bool
    versions: dict[str, int]
    """Table versions that are not the newest ones."""
    original: Manifest | None = None
    """Of the training set that is built again."""


@job("training_set", TrainingSetConfig, timed=True)
def main(config: TrainingSetConfig) -> None:
    """Build a training set and its manifest."""
    if config.manifest is not None:
        refuse_unused(("cutoff",), by="manifest=…")
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.training_set")
    request = requested(config, ledger)
    for view in request.spec.views:
        actor.check(Action.build_training_set, *view_resources(view, region=config.cluster.region))
    if request.original is None:
        views = [view.name for view in request.spec.views]
        heed(read_lifecycles(ledger), views, doing="No new training set is built.")
    manifest = produce(config, request, ledger, access=actor.access, actor=actor.name)
    if any(manifest["hidden_share"].values()):
        print(hidden_warning(manifest["hidden_share"]))
    print(
        f"training set {manifest['service']}: {manifest['rows']} rows, {len(manifest['columns'])} features, "
        f"hash {manifest['row_hash'][:16]}"
    )


def produce(
    config: TrainingSetConfig, request: Request, ledger: Ledger, *, access: KeyAccess, actor: str
) -> dict[str, Any]:
    """Join, write the rows and their manifest, say so in the ledger; gives the manifest.

    Raises:
        TrainingSetError: entity rows that cannot be joined, or are not those of the manifest.
        Inconsistent: the rows are not those of the manifest; nothing was written.
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
        check_same(original, table)
    output = resolve(config.output)
    write(table, output, request.spec, places=places, access=access)
    manifest["seq"] = ledger.append(event_of(manifest, output, original), actor=actor).seq
    write_bytes(manifest_path(output), json.dumps(manifest, indent=1).encode())
    return manifest


def join_entities(
    config: TrainingSetConfig, request: Request, entities: pa.Table, entities_hash: str, *, access: KeyAccess
) -> tuple[pa.Table, dict[str, Any]]:
    """The rows, and their manifest but for `seq`.

    Raises:
        TrainingSetError: entity rows that cannot be joined, or a view without rows.
    """
    spec = request.spec
    snapshots = pinned_tables(request, layout(config.storage), access)
    built = assemble(
        spec, snapshots, entities, join_parts=chosen_join(config, entities, snapshots), cutoff=request.cutoff
    )
    manifest = describe(
        spec,
        snapshots,
        built,
        entities=request.entities,
        entities_hash=entities_hash,
        row_hash=row_hash(built.table),
        cutoff=request.cutoff,
    )
    return built.table, manifest


def requested(config: TrainingSetConfig, ledger: Ledger) -> Request:
    """A service's newest version and the tables that are asked for, or what a manifest pins.

    Raises:
        TrainingSetError: a manifest that cannot be built again, or a version of a view that the service does not have.
        FeatureServiceNotFound: no such service was applied.
    """
    if config.manifest is None:
        spec = service_spec(ledger, str(config.service))
        known = [view.name for view in spec.views]
        if strange := [name for name in config.versions if name not in known]:
            raise TrainingSetError(
                f"Service '{spec.name}' has no view '{strange[0]}'.{did_you_mean(strange[0], known)}"
            )
        return Request(
            spec=spec, entities=str(config.entities), cutoff=config.cutoff, versions=config.versions
        )
    manifest = read_manifest(config.manifest)
    check_manifest(manifest, ledger)
    entities = config.entities or manifest.entities
    if entities is None:
        raise TrainingSetError(f"{manifest.path} does not say where its entity rows are. Give `entities=…`.")
    spec = service_spec(ledger, manifest.service, manifest.service_version)
    return Request(
        spec=spec,
        entities=entities,
        cutoff=manifest.cutoff,
        versions=manifest.table_versions,
        original=manifest,
    )


def pinned_tables(request: Request, places: Layout, access: KeyAccess) -> dict[str, Snapshot]:
    """Each view's table, at the version that is asked for.

    Raises:
        TrainingSetError: a view without rows, or files that were removed.
    """
    snapshots = {
        view.name: snapshot(
            places.features(view.name),
            view=view.name,
            keys=view.join_keys,
            protection=view_protection(view),
            access=access,
            version=request.versions.get(view.name),
        )
        for view in request.spec.views
    }
    for name in request.versions:
        check_files(snapshots[name], name)
    return snapshots


def chosen_join(config: TrainingSetConfig, entities: pa.Table, snapshots: dict[str, Snapshot]) -> JoinParts:
    """In this process while the work is small, in Ray tasks when it is large."""
    largest = entities.num_rows + max(pinned.rows for pinned in snapshots.values())
    if largest <= config.task_rows:
        return join_here
    attach(config)
    return join_in_tasks


def check_same(original: Manifest, table: pa.Table) -> None:
    """Go on only if the rows are those of the manifest.

    Raises:
        Inconsistent: they are others, though everything they come from is as it was.
    """
    if not has_row_hash(table, original.row_hash):
        raise Inconsistent(
            f"Built again from {original.path} the rows have hash {row_hash(table)[:16]}, "
            f"not {original.row_hash[:16]}. Nothing was written. Compare the tables' files with a backup."
        )


def event_of(manifest: dict[str, Any], output: str, original: Manifest | None) -> TrainingSetBuilt:
    """What is said in the ledger."""
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


def write(table: pa.Table, output: str, spec: ServiceSpec, *, places: Layout, access: KeyAccess) -> None:
    """Write the rows: protected below the storage root, in the clear where the caller takes them out of it."""
    place = place_of(output, places)
    if place is not None:
        protected_files(access).write(table, output, training_set_protection(spec), place=place)
    else:
        write_parquet(table, output)


def manifest_path(output: str) -> str:
    """Where a training set's manifest lies."""
    return f"{output.removesuffix('.parquet')}.manifest.json"


def read_entities(path: str) -> pa.Table:
    """The entity rows.

    Raises:
        TrainingSetError: there is no such file, it is a folder or no Parquet, or it has no rows.
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
    """What the cutoff costs, in one line."""
    said = ", ".join(f"{share:.2%} of the rows for '{view}'" for view, share in shares.items())
    return (
        f"warning: entity rows get null because a value was created only after their time: {said}. "
        "`cutoff=false` ignores created_timestamp."
    )


def join_in_tasks(pinned: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool) -> list[Joined]:
    """Join each bucket in a Ray task of its own."""
    import ray  # only where the work is large

    task = ray.remote(join_bucket)
    return ray.get([task.remote(pinned, view, part, cutoff) for part in parts])


if __name__ == "__main__":
    main()
