"""Collect the parts of a bundle from the registry and the ledger, and describe them in a signed statement."""

from __future__ import annotations

import datetime as dt
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.checkpoint import Signer
from cluster.ledger.events import ModelExported
from cluster.ledger.merkle import tree_of
from cluster.registry import ModelVersion
from cluster.runtime import Precision, open_model, parse_signature
from cluster.runtime.device_choice import Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.loader import read_file, require_rows
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import ONNX_FILE, SIGNATURE_FILE
from cluster.security.authorization.policy import Resource
from cluster.security.keys.store import KeyStore
from cluster.settings import PlatformConfig
from cluster.storage import json_text
from jobs.promotion.archive import MAX_BUNDLE_BYTES, Part
from jobs.promotion.definitions import (
    Definitions,
    column_classes,
    definition_entries,
    from_entries,
    input_resources,
)
from jobs.promotion.history import card, read_history, write_events
from jobs.promotion.reference import parity, reference_rows, write_reference
from jobs.promotion.statement import (
    CARD,
    DEFINITIONS,
    EVENTS,
    INT8,
    MAX_PARTS,
    MODEL,
    REFERENCE,
    Installation,
    Statement,
    describe_parts,
    seal_statement,
)
from jobs.train.quantise import bounded_layers, quantise

TWO_THREADS = Hardware(num_threads=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A bundle that is ready to be written."""

    statement: Statement
    envelope: bytes
    parts: dict[str, bytes]
    """In the order of the statement."""
    event: ModelExported
    parity: dict[str, Any] | None
    """How far the int8 scores differ from the float32 scores; None if the bundle has no int8 graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A version to export, with the entries that applied its definitions."""

    ledger: Ledger
    version: ModelVersion
    applied: list[Entry]

    @property
    def definitions(self) -> Definitions:
        """The feature service of the version, and its views."""
        return from_entries(self.applied)

    def resources(self, *, region: str) -> list[Resource]:
        """Return what the policies must permit the exporter to use."""
        return input_resources(self.definitions, model=self.version.name, region=region)


def find_source(ledger: Ledger, version: ModelVersion) -> Source:
    """Return a version with the entries that applied its definitions.

    Raises:
        DefinitionsDiffer: The version's feature service was never applied here.
        RefusedError: The version is a language model.
    """
    require_rows(version)
    return Source(ledger=ledger, version=version, applied=definition_entries(ledger, version.lineage))


def build_export(
    config: PlatformConfig, source: Source, *, store: KeyStore, signer: Signer, folder: Path
) -> Export:
    """Decrypt a version, add what the ledger knows about it, and sign a statement about all parts.

    Args:
        config: The exporter's configuration.
        source: The version to export.
        store: Key store with the model's key.
        signer: The exporter's signing key.
        folder: Empty folder for the decrypted files.

    Raises:
        ArtifactTampered: A file differs from the registered one.
        AccessDenied, KeyRevoked: The key store refuses the key.
        ConfigError: The bundle would be too large.
    """
    version = source.version
    parts, cost = _model_parts(version, store, folder)
    history = read_history(source.ledger, version, source.applied)
    tree = tree_of(source.ledger)
    parts |= {
        DEFINITIONS: json_text(source.definitions.to_json()).encode(),
        CARD: json_text(card(history, version) | {"int8": cost}).encode(),
        EVENTS: write_events(history, tree),
    }
    described = _describe(parts, version)
    statement = Statement(
        installation=Installation(
            key_id=signer.key_id,
            tier=config.tier.value,
            region=config.cluster.region,
            environment=config.identity.environment,
        ),
        name=version.name,
        version=version.version,
        entry_hash=history.trace.registered.hash,
        exported_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        ledger=tree.head,
        parts=described,
    )
    return Export(
        statement=statement,
        envelope=seal_statement(statement, signer),
        parts={part.name: parts[part.name] for part in described},
        event=_event(statement, column_classes(source.resources(region=config.cluster.region))),
        parity=cost,
    )


def _model_parts(
    version: ModelVersion, store: KeyStore, folder: Path
) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """Return the model's files, reference rows and int8 graph, and how far the int8 scores differ.

    The difference is None if there is no int8 graph.
    """
    parts = {f"{MODEL}{name}": read_file(version, name, store) for name in version.files}
    for name in version.files:
        (folder / name).write_bytes(parts[f"{MODEL}{name}"])
    rows, scores = _reference(folder)
    parts[REFERENCE] = write_reference(rows, scores)
    graph = int8_graph(folder)
    if graph is None:
        return parts, None
    parts[f"{INT8}{ONNX_FILE}"] = graph
    return parts, parity(scores, int8_scores(folder, graph, rows))


def _describe(parts: dict[str, bytes], version: ModelVersion) -> tuple[Part, ...]:
    """Return name, size and hash of each part.

    Raises:
        ConfigError: There are too many parts, or they are too large.
    """
    described = describe_parts(parts)
    total = sum(part.size for part in described)
    if total > MAX_BUNDLE_BYTES or len(described) > MAX_PARTS:
        raise ConfigError(
            f"{version.name} version {version.version} has {len(described)} parts with {total} bytes. A bundle has at "
            f"most {MAX_PARTS} parts with {MAX_BUNDLE_BYTES} bytes."
        )
    return described


def _event(statement: Statement, classes: list[str]) -> ModelExported:
    return ModelExported(
        name=statement.name,
        version=statement.version,
        bundle=statement.sha256,
        key_id=statement.installation.key_id,
        parts={part.name: part.sha256 for part in statement.parts},
        column_classes=classes,
        ledger_size=statement.ledger.size,
        ledger_root=statement.ledger.root,
    )


def _reference(folder: Path) -> tuple[Matrix, Scores]:
    model = open_model(folder, hardware=TWO_THREADS)
    rows = reference_rows(model.signature, folder)
    return rows, model.predict_matrix(rows).scores


def int8_graph(folder: Path) -> bytes | None:
    """Return the int8 graph of a float32 network; None for other models, and if no layer can be quantised."""
    path = folder / ONNX_FILE
    signature = parse_signature((folder / SIGNATURE_FILE).read_bytes())
    if (
        signature.precision is not Precision.float32
        or not path.exists()
        or not bounded_layers(onnx.load(path))
    ):
        return None
    with tempfile.TemporaryDirectory(dir=folder) as other:
        copy = Path(other, ONNX_FILE)
        copy.write_bytes(path.read_bytes())
        quantise(Path(other))
        return copy.read_bytes()


def int8_scores(folder: Path, graph: bytes, rows: Matrix) -> Scores:
    """Return the scores of an int8 graph, with the signature of a folder of float32 files."""
    signature = (folder / SIGNATURE_FILE).read_bytes()
    with tempfile.TemporaryDirectory(dir=folder) as other:
        write_int8(Path(other), signature, graph)
        return open_model(Path(other), hardware=TWO_THREADS).predict_matrix(rows).scores


def write_int8(folder: Path, signature: bytes, graph: bytes) -> None:
    """Write an int8 graph and its signature into a folder."""
    (folder / ONNX_FILE).write_bytes(graph)
    int8 = replace(parse_signature(signature), precision=Precision.int8)
    (folder / SIGNATURE_FILE).write_text(int8.to_json())
