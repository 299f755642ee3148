"""A training set's manifest: what it was built from, so that the same rows can be built again and known to be the same.

It pins the service's version, and through it every view's, each table's version, the entity rows by their hash, and
whether the cutoff was on. The ledger's event at `seq` holds the same, so a manifest that was altered is found out; and
an event says where retention or erasure has since taken rows away that it needs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import TrainingSetError
from cluster.ledger import Ledger
from cluster.ledger.events import TrainingSetBuilt, TrainingSetNotReproducible
from cluster.storage import exists, read_bytes, resolve
from feature_jobs.store.catalog.specifications import OnDemandSpec, ServiceSpec, ViewSpec
from feature_jobs.store.definitions.missing import view_of
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import Built


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a rebuild needs of a manifest."""

    path: str
    seq: int
    """Of the `TrainingSetBuilt` event."""
    service: str
    service_version: str
    table_versions: dict[str, int]
    entities: str | None
    """Where the entity rows were; manifests of before do not say."""
    entities_hash: str
    row_hash: str
    cutoff: bool


def read_manifest(path: str) -> Manifest:
    """A manifest from its file.

    Raises:
        TrainingSetError: there is no such file, or it is no manifest.
    """
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(f"No manifest at {uri}. It lies beside its training set, `….manifest.json`.")
    try:
        content = json.loads(read_bytes(uri))
        return Manifest(
            path=uri,
            seq=int(content["seq"]),
            service=content["service"],
            service_version=content["service_version"],
            table_versions=dict(content["table_versions"]),
            entities=content.get("entities"),
            entities_hash=content["entities_hash"],
            row_hash=content["row_hash"],
            cutoff=content.get("cutoff", True),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingSetError(
            f"{uri} is no manifest of a training set: {type(error).__name__} {error}."
        ) from error


def check_manifest(manifest: Manifest, ledger: Ledger) -> None:
    """Go on only with a manifest that the ledger knows and whose rows are all still there.

    Raises:
        TrainingSetError: the ledger has no such training set, or rows that it needs were removed since.
    """
    check_known(manifest, ledger)
    for entry in ledger.entries(TrainingSetNotReproducible):
        if entry.payload["training_set"] == manifest.seq:
            raise TrainingSetError(
                f"{manifest.path} is not reproducible since {entry.time}: rows of view '{entry.payload['view']}' were "
                f"removed ({entry.payload['cause']}). Build a new training set."
            )


def check_known(manifest: Manifest, ledger: Ledger) -> None:
    """Go on only with a manifest that the ledger knows.

    Raises:
        TrainingSetError: the ledger has no such training set.
    """
    if not any(_is_of(entry.payload, manifest) for entry in _entries_at(ledger, manifest.seq)):
        raise TrainingSetError(
            f"The ledger has no training set at {manifest.seq} as {manifest.path} describes it. Take the manifest as "
            "it was written, in the project that built it."
        )


def check_files(pinned: Snapshot, view: str) -> None:
    """Go on only if all files of a pinned table version are there.

    Raises:
        TrainingSetError: one was removed.
    """
    gone = [file.path for file in pinned.files if not exists(f"{pinned.uri}/{file.path}")]
    if gone:
        raise TrainingSetError(
            f"View '{view}': {len(gone)} files of table version {pinned.version} were removed, {gone[0]} for one. The "
            "training set is not reproducible; build a new one, or restore the files from a backup."
        )


def describe(
    spec: ServiceSpec,
    snapshots: dict[str, Snapshot],
    built: Built,
    *,
    entities: str | None,
    entities_hash: str,
    row_hash: str,
    cutoff: bool,
) -> dict[str, Any]:
    """The manifest's content, but for `seq`.

    Args:
        spec: the service.
        snapshots: the pinned table of each view.
        built: the rows.
        entities: where the entity rows came from.
        entities_hash: their row hash.
        row_hash: that of the built rows.
        cutoff: whether it was on.
    """
    table = built.table
    parts: list[ViewSpec | OnDemandSpec] = [*spec.views, *spec.on_demand]
    columns = [
        {
            "name": name,
            "dtype": field.dtype,
            "categorical": field.categorical or field.dtype == "string",
            "view": one.name,
            "feature": field.name,
        }
        for one in parts
        for name, field in zip(one.columns, one.fields, strict=True)
    ]
    default_share = {name: built.absent[view_of(name)] / table.num_rows for name in spec.missing.defaults}
    return {
        "service": spec.name,
        "service_version": spec.version,
        "view_versions": {view.name: view.version for view in spec.views},
        "table_versions": {name: pinned.version for name, pinned in snapshots.items()},
        "entities": entities,
        "entities_hash": entities_hash,
        "row_hash": row_hash,
        "rows": table.num_rows,
        "join_keys": _join_keys(spec, table.column_names),
        "columns": columns,
        "cutoff": cutoff,
        "hidden_share": {view: count / table.num_rows for view, count in built.hidden.items()},
        "null_share": {name: table[name].null_count / table.num_rows for name in spec.columns},
        **({"default_share": default_share} if default_share else {}),
    }


def _join_keys(spec: ServiceSpec, columns: list[str]) -> list[str]:
    """The keys that the entity rows have, in the order of the service's views."""
    keys = dict.fromkeys(key for view in spec.views for key in view.join_keys)
    return [key for key in keys if key in columns]


def _entries_at(ledger: Ledger, seq: int) -> list[Any]:
    return [entry for entry in ledger.entries(TrainingSetBuilt, after=seq - 1) if entry.seq == seq]


def _is_of(payload: dict[str, Any], manifest: Manifest) -> bool:
    said = {"cutoff": True} | payload
    names = ("service", "service_version", "table_versions", "entities_hash", "row_hash", "cutoff")
    return all(said[name] == getattr(manifest, name) for name in names)
