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
from cluster.ledger.checkpoint import Signer
from cluster.ledger.events import ModelExported
from cluster.ledger.merkle import tree_of
from cluster.registry import ModelVersion
from cluster.runtime import Precision, open_model, parse_signature
from cluster.runtime.device_choice import Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.loader import read_file
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import ONNX_FILE, SIGNATURE_FILE
from cluster.security.authorization.policy import Resource
from cluster.security.keys.store import KeyStore
from cluster.settings import PlatformConfig
from cluster.storage import json_text
from jobs.promotion.archive import MAX_BUNDLE_BYTES
from jobs.promotion.definitions import column_classes, definition_entries, from_entries, input_resources
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


def export_resources(ledger: Ledger, version: ModelVersion, *, region: str) -> list[Resource]:
    """Return what the policies must permit the exporter to use."""
    definitions = from_entries(definition_entries(ledger, version.lineage))
    return input_resources(definitions, model=version.name, region=region)


def build_export(
    config: PlatformConfig,
    ledger: Ledger,
    version: ModelVersion,
    *,
    store: KeyStore,
    signer: Signer,
    folder: Path,
) -> Export:
    """Decrypt a version, add what the ledger knows about it, and sign a statement about all parts.

    Args:
        config: The exporter's configuration.
        ledger: The exporter's ledger.
        version: The version to export.
        store: Key store with the model's key.
        signer: The exporter's signing key.
        folder: Empty folder for the decrypted files.

    Raises:
        ArtifactTampered: A file differs from the registered one.
        AccessDenied, KeyRevoked: The key store refuses the key.
    """
    parts = {f"{MODEL}{name}": read_file(version, name, store) for name in version.files}
    for name in version.files:
        (folder / name).write_bytes(parts[f"{MODEL}{name}"])
    rows, scores = _reference(folder)
    parts[REFERENCE] = write_reference(rows, scores)
    cost = None
    if (graph := int8_graph(folder)) is not None:
        parts[f"{INT8}{ONNX_FILE}"] = graph
        cost = parity(scores, int8_scores(folder, graph, rows))
    found = definition_entries(ledger, version.lineage)
    definitions = from_entries(found)
    history = read_history(ledger, version, found)
    parts[DEFINITIONS] = json_text(definitions.to_json()).encode()
    parts[CARD] = json_text(card(history, version) | {"int8": cost}).encode()
    tree = tree_of(ledger)
    parts[EVENTS] = write_events(history, tree)
    described = describe_parts(parts)
    total = sum(part.size for part in described)
    if total > MAX_BUNDLE_BYTES or len(described) > MAX_PARTS:
        raise ConfigError(
            f"{version.name} version {version.version} has {len(described)} parts with {total} bytes. A bundle has at "
            f"most {MAX_PARTS} parts with {MAX_BUNDLE_BYTES} bytes."
        )
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
    event = ModelExported(
        name=version.name,
        version=version.version,
        bundle=statement.sha256,
        key_id=signer.key_id,
        parts={part.name: part.sha256 for part in described},
        column_classes=column_classes(
            input_resources(definitions, model=version.name, region=config.cluster.region)
        ),
        ledger_size=tree.head.size,
        ledger_root=tree.head.root,
    )
    return Export(
        statement=statement,
        envelope=seal_statement(statement, signer),
        parts={part.name: parts[part.name] for part in described},
        event=event,
        parity=cost,
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
