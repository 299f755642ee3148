"""A version's events in the exporter's ledger with their proofs, and the version's card for readers.

The events are the version's registration, its training set, the definitions and batches behind it, and its evaluations.
Each event has a path in the Merkle tree of the exporter's ledger. The root is in the signed statement.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import ArtifactTampered
from cluster.ledger import Ledger
from cluster.ledger.chain import FIELDS, Entry, canonical, has_own_hash
from cluster.ledger.events import (
    AliasMoved,
    LedgerEvent,
    ModelEvaluated,
    ModelMonitored,
    ModelRegistered,
)
from cluster.ledger.merkle import Tree, TreeHead, is_included
from cluster.lineage.trace import ModelTrace, read_entries, trace_model
from cluster.registry import ModelVersion
from jobs.promotion.statement import EVENTS


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The entries of a version in the exporter's ledger."""

    trace: ModelTrace
    definitions: list[Entry]
    """Applied service and views of the version's feature service."""
    evaluations: list[Entry]
    monitored: list[Entry]
    aliases: dict[str, int]
    """Aliases of the model at the export."""

    @property
    def entries(self) -> list[Entry]:
        """All entries, in order."""
        entries = [
            self.trace.registered,
            *self.definitions,
            *self.trace.batches,
            *self.evaluations,
            *self.monitored,
            *self.trace.deployments,
        ]
        if self.trace.training_set is not None:
            entries.append(self.trace.training_set)
        return sorted({entry.seq: entry for entry in entries}.values(), key=lambda entry: entry.seq)


def read_history(ledger: Ledger, version: ModelVersion, definitions: list[Entry]) -> History:
    """Read the entries of a version.

    Args:
        ledger: The exporter's ledger.
        version: The version.
        definitions: Entries that applied its service and views.
    """
    found = read_entries(ledger, version.name, version.version)
    moved = {entry.payload["alias"]: entry for entry in ledger.find(AliasMoved, name=version.name)}
    return History(
        trace=trace_model(found, version.name, version.version),
        definitions=definitions,
        evaluations=_of_version(ledger, ModelEvaluated, "name", version),
        monitored=_of_version(ledger, ModelMonitored, "model", version)[-1:],
        aliases={alias: entry.payload["version"] for alias, entry in moved.items()},
    )


def _of_version(ledger: Ledger, kind: type[LedgerEvent], field: str, version: ModelVersion) -> list[Entry]:
    wanted = (version.name, version.version)
    return [
        entry
        for entry in ledger.entries(kind)
        if (entry.payload.get(field), entry.payload.get("version")) == wanted
    ]


def write_events(history: History, tree: Tree) -> bytes:
    """Return the entries and their paths in the tree, as JSON lines."""
    lines = [
        canonical({"entry": asdict(entry), "path": tree.path(entry.seq)}).decode() + "\n"
        for entry in history.entries
    ]
    return "".join(lines).encode()


def read_events(data: bytes, head: TreeHead) -> list[Entry]:
    """Parse the entries, and verify each: its content has its hash, and the tree includes it.

    Raises:
        ArtifactTampered: An event is not from the ledger that the statement names.
    """
    return list(_read_events(data, head))


def _read_events(data: bytes, head: TreeHead) -> Iterator[Entry]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            content = json.loads(line)
            entry = Entry(**{name: content["entry"][name] for name in FIELDS})
            is_proved = has_own_hash(entry) and is_included(entry, content["path"], head)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ArtifactTampered(f"Line {number} of {EVENTS} is no event with its proof.") from error
        if not is_proved:
            raise ArtifactTampered(
                f"Event {entry.seq} in {EVENTS} is not in the exporter's ledger of {head.size} events."
            )
        yield entry


def require_registration(entries: list[Entry], entry_hash: str, *, name: str, version: int) -> Entry:
    """Return the entry that registered the version.

    Raises:
        ArtifactTampered: It is missing, or registers another version.
    """
    for entry in entries:
        is_wanted = entry.hash == entry_hash and entry.type == ModelRegistered.__name__
        if is_wanted and (entry.payload["name"], entry.payload["version"]) == (name, version):
            return entry
    raise ArtifactTampered(f"{EVENTS} does not have the event that registered {name} version {version}.")


def card(history: History, version: ModelVersion) -> dict[str, Any]:
    """Return the version's card: what the ledger knows about the version today."""
    trace = history.trace
    return {
        "model": version.name,
        "version": version.version,
        "family": version.family,
        "task": version.task,
        "registered_at": trace.registered.time,
        "registered_by": trace.registered.actor,
        "metrics": version.metrics,
        "warnings": version.warnings,
        "lineage": asdict(version.lineage),
        "origin": version.origin,
        "training_set": trace.training_set.payload if trace.training_set else None,
        "columns": [asdict(column) for column in trace.columns],
        "batches": [entry.payload["ingest_id"] for entry in trace.batches],
        "evaluations": [_dated(entry) for entry in history.evaluations],
        "monitored": [_dated(entry) for entry in history.monitored],
        "deployments": [_dated(entry) for entry in trace.deployments],
        "aliases": [alias for alias, number in history.aliases.items() if number == version.version],
    }


def _dated(entry: Entry) -> dict[str, Any]:
    return {"time": entry.time, "actor": entry.actor} | entry.payload
