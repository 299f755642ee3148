"""Verify a bundle, and turn it into a version of this installation.

The order is: signature, hashes of all parts, events, what is here already, policies, definitions, formats, scores. Only
then the version is encrypted with this installation's key and registered. The registration is one event, so a killed
import leaves no version.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.artifact import ALLOWED_SUFFIXES
from cluster.errors import ArtifactTampered, ConfigError, RefusedError
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry, canonical
from cluster.ledger.checkpoint import Signer
from cluster.ledger.events import ModelRegistered
from cluster.node.locks import hold_lock
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.runtime import ModelSignature, Precision, open_model
from cluster.runtime.signature import NETWORK_FILE, ONNX_FILE, SIGNATURE_FILE, WEIGHTS_FILE, Task
from cluster.security.keys.store import KeyStore
from cluster.settings import Tier
from jobs.promotion.archive import Part, read_archive
from jobs.promotion.definitions import Definitions, from_entries, input_resources
from jobs.promotion.exporting import TWO_THREADS, write_int8
from jobs.promotion.history import read_events, require_registration
from jobs.promotion.reference import (
    describe_parity,
    parity,
    read_reference,
    require_close_scores,
    require_same_scores,
)
from jobs.promotion.statement import (
    DEFINITIONS,
    EVENTS,
    INT8,
    MODEL,
    REFERENCE,
    Statement,
    open_statement,
)
from jobs.promotion.trust import TrustedKey

INT8_GRAPH = f"{INT8}{ONNX_FILE}"
LOCK = "import.lock"


class ImportPrecision(enum.Enum):
    """Number type of an imported network."""

    auto = "auto"
    """int8 if this tier is `smb_cpu`, the exporter's is another, and the bundle has an int8 graph; else as exported."""
    exported = "exported"
    """As exported."""
    int8 = "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A verified bundle."""

    statement: Statement
    exporter: TrustedKey
    parts: dict[str, bytes]
    entries: list[Entry]
    registered: Entry
    """The event that registered the version at the exporter."""
    definitions: Definitions

    @property
    def model_files(self) -> dict[str, bytes]:
        """The model's files as exported, by name."""
        return {name.removeprefix(MODEL): data for name, data in self.parts.items() if name.startswith(MODEL)}


def read_bundle(path: Path, trusted: dict[str, TrustedKey], *, advice: str) -> Bundle:
    """Read and verify a bundle. Nothing is written.

    Raises:
        ConfigError: The file cannot be read, or its key is not trusted.
        ArtifactTampered: A part differs from what was signed. The message names it.
    """

    def open_envelope(envelope: bytes) -> tuple[tuple[Statement, TrustedKey], Sequence[Part]]:
        statement, exporter = open_statement(envelope, trusted, advice=advice)
        return (statement, exporter), statement.parts

    (statement, exporter), parts = read_archive(path, open_envelope)
    entries = read_events(parts[EVENTS], statement.ledger)
    try:
        return _bundle(statement, exporter, parts, entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactTampered(
            f"The events in {EVENTS} are signed, but this release cannot read them: {error!r}. Export the version with "
            "the release of this installation."
        ) from error


def _bundle(
    statement: Statement, exporter: TrustedKey, parts: dict[str, bytes], entries: list[Entry]
) -> Bundle:
    """Return the bundle, and require that its events have what the import reads.

    Raises:
        KeyError, TypeError, AttributeError: They do not.
    """
    bundle = Bundle(
        statement=statement,
        exporter=exporter,
        parts=parts,
        entries=entries,
        registered=require_registration(
            entries, statement.entry_hash, name=statement.name, version=statement.version
        ),
        definitions=_definitions(parts[DEFINITIONS], entries),
    )
    payload = bundle.registered.payload
    _lineage(payload["lineage"]), payload["family"], payload["task"], payload["metrics"]
    input_resources(bundle.definitions, model=statement.name, region=statement.installation.region)
    views = [] if bundle.definitions.service is None else bundle.definitions.service["view_order"]
    for view in views:
        definition = bundle.definitions.views[view]["definition"]
        definition["ttl_s"], definition["schema"]
    return bundle


def _definitions(data: bytes, entries: list[Entry]) -> Definitions:
    """Return the definitions of the events, and require that `definitions.json` has the same.

    Raises:
        ArtifactTampered: It has others.
    """
    definitions = from_entries(entries)
    try:
        is_same = json.loads(data) == definitions.to_json()
    except (ValueError, RecursionError):
        is_same = False
    if not is_same:
        raise ArtifactTampered(f"{DEFINITIONS} has other definitions than the events in {EVENTS}.")
    return definitions


def require_new(
    bundle: Bundle, ledger: Ledger, *, precision: Precision | None, own: Signer | None, older: bool = False
) -> str:
    """Require that the version is not in this installation yet, and return the hash that identifies its content.

    Args:
        bundle: The bundle.
        ledger: The importer's ledger.
        precision: int8, or None to keep the precision.
        own: The importer's signing key.
        older: Whether a newer version of the same installation may be here.

    Raises:
        RefusedError: The version was exported here, or was imported before, also if other installations had it in
            between; or a newer one of the same installation is here. The message names the version.
    """
    statement = bundle.statement
    if own is not None and statement.installation.key_id == own.key_id:
        raise RefusedError(
            f"This installation exported the bundle: it has {statement.name} version {statement.version} already."
        )
    content = content_hash(bundle, precision=precision)
    first, is_int8 = _first_registration(bundle.registered.hash, bundle.registered.payload.get("origin", {}))
    wanted = first, is_int8 or precision is Precision.int8
    for entry in ledger.find(ModelRegistered, name=statement.name):
        found = entry.payload.get("origin", {})
        is_same = entry.hash == first or _first_registration(entry.hash, found) == wanted
        if is_same or found.get("content") == content:
            raise RefusedError(
                f"{statement.name} version {statement.version} of '{bundle.exporter.name}' is here already, as version "
                f"{entry.payload['version']}. Deploy that version."
            )
        is_newer = found.get("version", 0) > statement.version
        if is_newer and not older and found["key_id"] == statement.installation.key_id:
            raise RefusedError(
                f"The newer version {found['version']} of '{bundle.exporter.name}' is here as version "
                f"{entry.payload['version']}, and `latest` would become the older one. To import it, set older=true."
            )
    return content


def _first_registration(entry_hash: str, origin: dict[str, Any]) -> tuple[str, bool]:
    """Return the hash of the event that registered a model first, and whether it became int8 on its way."""
    is_int8 = False
    while origin:
        entry_hash, is_int8 = origin["entry_hash"], is_int8 or origin.get("parity") is not None
        origin = origin.get("before", {})
    return entry_hash, is_int8


def content_hash(bundle: Bundle, *, precision: Precision | None) -> str:
    """Return the hash of the model's files and of the precision that they are imported with."""
    files = {part.name: part.sha256 for part in bundle.statement.parts if part.name.startswith(MODEL)}
    chosen = precision.value if precision is not None else "exported"
    return hashlib.sha256(canonical({"files": files, "precision": chosen})).hexdigest()


def choose_precision(bundle: Bundle, requested: ImportPrecision, *, tier: Tier) -> Precision | None:
    """Return int8 if the network is imported as int8; None if it stays as it was exported.

    Raises:
        ConfigError: int8 was requested, and the bundle has no int8 graph.
    """
    has_int8 = INT8_GRAPH in bundle.parts
    if requested is ImportPrecision.int8 and not has_int8:
        raise ConfigError(
            "precision=int8 needs an int8 graph, and the bundle has none: only float32 networks with bounded layers "
            "get one. Use precision=exported."
        )
    other_tier = bundle.statement.installation.tier != tier.value
    automatic = requested is ImportPrecision.auto and tier is Tier.smb_cpu and other_tier and has_int8
    return Precision.int8 if requested is ImportPrecision.int8 or automatic else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A folder of model files that is ready to be registered."""

    folder: Path
    parity: dict[str, Any] | None
    """How far the int8 scores differ from the float32 scores on the reference rows; None unless imported as int8."""


def prepare(bundle: Bundle, folder: Path, *, service_version: str, precision: Precision | None) -> Prepared:
    """Write the model's files into an empty folder, and check their formats, definitions and scores.

    Args:
        bundle: The bundle.
        folder: Empty folder.
        service_version: This installation's version of the feature service; "" without a service.
        precision: int8, or None to keep the precision.

    Raises:
        RefusedError: A format is not allowed, or the model is not valid or gives other scores here.
    """
    exported, final = folder / "exported", folder / "final"
    exported.mkdir()
    for name, data in bundle.model_files.items():
        if not name.endswith(ALLOWED_SUFFIXES):
            raise RefusedError(
                f"'{MODEL}{name}' has no allowed format; models are imported as {', '.join(ALLOWED_SUFFIXES)} only."
            )
        (exported / name).write_bytes(data)
    model = open_model(exported, hardware=TWO_THREADS)
    _check_service(model.signature, bundle.definitions)
    rows, expected = read_reference(bundle.parts[REFERENCE])
    require_same_scores(model, rows, expected)
    signature = replace(model.signature, service_version=service_version)
    if precision is None:
        (exported / SIGNATURE_FILE).write_text(signature.to_json())
        return Prepared(folder=exported, parity=None)
    final.mkdir()
    for name in bundle.model_files.keys() - {ONNX_FILE, NETWORK_FILE, WEIGHTS_FILE, SIGNATURE_FILE}:
        (final / name).write_bytes(bundle.model_files[name])
    write_int8(final, signature.to_json().encode(), bundle.parts[INT8_GRAPH])
    int8 = open_model(final, hardware=TWO_THREADS).predict_matrix(rows).scores
    cost = parity(expected, int8)
    require_close_scores(cost, expected, is_number=signature.task is Task.regression)
    return Prepared(folder=final, parity=cost)


def _check_service(signature: ModelSignature, definitions: Definitions) -> None:
    service = definitions.service or {"service": "", "version": ""}
    if (signature.service, signature.service_version) != (service["service"], service["version"]):
        raise ArtifactTampered(
            f"The model reads the feature service '{signature.service}' version {signature.service_version}, but "
            f"{DEFINITIONS} has '{service['service']}' version {service['version']}."
        )


def register(
    bundle: Bundle,
    prepared: Prepared,
    registry: Registry,
    *,
    content: str,
    service_version: str,
    store: KeyStore,
    actor: str,
) -> ModelVersion:
    """Encrypt and register the prepared files as the next version of the model."""
    payload = bundle.registered.payload
    warnings = list(payload.get("warnings", []))
    if prepared.parity is not None:
        warnings.append(
            "imported as int8; the metrics are those of the float32 network, whose scores differ by "
            f"{describe_parity(prepared.parity)}"
        )
    return registry.register(
        prepared.folder,
        name=bundle.statement.name,
        family=payload["family"],
        task=payload["task"],
        lineage=replace(_lineage(payload["lineage"]), service_version=service_version),
        metrics=payload["metrics"],
        warnings=warnings,
        origin=origin(bundle, prepared, content=content),
        store=store,
        actor=actor,
    )


def _lineage(recorded: dict[str, Any]) -> Lineage:
    """Return the lineage, without fields that only a newer release knows."""
    known = {field.name for field in fields(Lineage)}
    return Lineage(**{name: value for name, value in recorded.items() if name in known})


def origin(bundle: Bundle, prepared: Prepared, *, content: str) -> dict[str, Any]:
    """Return where the version comes from, for the event that registers it."""
    statement, registered = bundle.statement, bundle.registered
    return {
        "installation": bundle.exporter.name,
        "key_id": statement.installation.key_id,
        "tier": statement.installation.tier,
        "region": statement.installation.region,
        "environment": statement.installation.environment,
        "version": statement.version,
        "registered_by": registered.actor,
        "registered_at": registered.time,
        "entry_hash": registered.hash,
        "service_version": registered.payload["lineage"].get("service_version", ""),
        "exported_at": statement.exported_at,
        "ledger_size": statement.ledger.size,
        "ledger_root": statement.ledger.root,
        "bundle": statement.sha256,
        "content": content,
        "parity": prepared.parity,
        "before": registered.payload.get("origin", {}),
    }


def import_lock(folder: Path) -> AbstractContextManager[None]:
    """Let one import run at a time, so that no version is imported twice. A killed import releases the lock.

    Raises:
        ConfigError: Another import runs.
    """
    return hold_lock(folder / LOCK, "Another import runs in this installation. Wait until it has ended.")
