"""The manifest of a training set: its inputs, so that the same rows can be built again and verified.

A manifest pins the version of the service, and with it the version of every view. It also pins the version of each
table, the hash of the entity rows, and whether the cutoff was on. The ledger event `seq` contains the same facts, so a
changed manifest is detected. Another event marks training sets whose rows were later removed, for example by retention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import TrainingSetError
from cluster.ledger import Ledger
from cluster.ledger.events import TrainingSetBuilt, TrainingSetNotReproducible
from cluster.storage import exists, read_bytes, resolve
from feature_jobs.store.catalog.specifications import OnDemandSpec, ServiceSpec, ViewSpec
from feature_jobs.store.definitions.missing import view_of

if TYPE_CHECKING:  # training reads manifests, and does not need Polars and delta-rs
    from feature_jobs.store.offline.tables import Snapshot
    from feature_jobs.store.offline.training_set import BuiltTrainingSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The parts of a manifest that a rebuild needs."""

    path: str
    seq: int
    """Sequence number of the `TrainingSetBuilt` event in the ledger."""
    service: str
    service_version: str
    table_versions: dict[str, int]
    """Table version by view."""
    entities: str | None
    """Path of the entity rows. None in manifests of earlier releases, which do not record it."""
    entities_hash: str
    row_hash: str
    cutoff: bool


def read_manifest(path: str) -> Manifest:
    """Read a manifest from its file.

    Raises:
        TrainingSetError: the file does not exist, or it is not a manifest.
    """
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(
            f"No manifest at {uri}. The manifest of a training set is the file `….manifest.json` beside it."
        )
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
            f"{uri} is not the manifest of a training set: {type(error).__name__} {error}."
        ) from error


def require_reproducible(manifest: Manifest, ledger: Ledger) -> None:
    """Require that the ledger has the training set and that none of its rows was removed.

    Raises:
        TrainingSetError: the ledger has no such training set, or rows that it needs were removed.
    """
    require_recorded(manifest, ledger)
    for entry in ledger.find(TrainingSetNotReproducible, training_set=manifest.seq):
        raise TrainingSetError(
            f"{manifest.path} is not reproducible since {entry.time}: rows of view '{entry.payload['view']}' were "
            f"removed ({entry.payload['cause']}). Build a new training set."
        )


def require_recorded(manifest: Manifest, ledger: Ledger) -> None:
    """Require that the ledger has the training set.

    Raises:
        TrainingSetError: the ledger has no such training set.
    """
    recorded = ledger.get(manifest.seq)
    is_built = recorded is not None and recorded.type == TrainingSetBuilt.__name__
    if recorded is None or not is_built or not _matches(manifest, recorded.payload):
        raise TrainingSetError(
            f"The ledger has no training set at {manifest.seq} that matches {manifest.path}. Use the unchanged "
            "manifest, in the project that built it."
        )


def require_files(pinned: Snapshot, view: str) -> None:
    """Require that all files of a pinned table version exist.

    Raises:
        TrainingSetError: a file was removed.
    """
    missing = [file.path for file in pinned.files if not exists(f"{pinned.uri}/{file.path}")]
    if missing:
        raise TrainingSetError(
            f"View '{view}': {len(missing)} files of table version {pinned.version} were removed, for example "
            f"{missing[0]}. The training set is not reproducible. Build a new one, or restore the files from a backup."
        )


def manifest_content(
    spec: ServiceSpec,
    snapshots: dict[str, Snapshot],
    built: BuiltTrainingSet,
    *,
    entities: str | None,
    entities_hash: str,
    row_hash: str,
    cutoff: bool,
) -> dict[str, Any]:
    """Return the content of the manifest without `seq`.

    Args:
        spec: the service.
        snapshots: the pinned table of each view.
        built: the built training set.
        entities: path of the entity rows.
        entities_hash: row hash of the entity rows.
        row_hash: row hash of the built rows.
        cutoff: whether the cutoff was on.
    """
    table = built.table
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
        "columns": _columns(spec),
        "cutoff": cutoff,
        "hidden_share": {view: count / table.num_rows for view, count in built.hidden.items()},
        "null_share": {name: table[name].null_count / table.num_rows for name in spec.columns},
        **({"default_share": default_share} if default_share else {}),
    }


def _columns(spec: ServiceSpec) -> list[dict[str, Any]]:
    """Describe the feature columns of a service."""
    parts: list[ViewSpec | OnDemandSpec] = [*spec.views, *spec.on_demand]
    return [
        {
            "name": name,
            "dtype": field.dtype,
            "categorical": field.categorical or field.dtype == "string",
            "view": part.name,
            "feature": field.name,
        }
        for part in parts
        for name, field in zip(part.columns, part.fields, strict=True)
    ]


def _join_keys(spec: ServiceSpec, columns: list[str]) -> list[str]:
    """Return the join keys that the entity rows have, in the order of the service's views."""
    keys = dict.fromkeys(key for view in spec.views for key in view.join_keys)
    return [key for key in keys if key in columns]


def _matches(manifest: Manifest, payload: dict[str, Any]) -> bool:
    recorded = {"cutoff": True} | payload
    names = ("service", "service_version", "table_versions", "entities_hash", "row_hash", "cutoff")
    return all(recorded[name] == getattr(manifest, name) for name in names)
