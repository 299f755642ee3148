"""The signed statement of a bundle: an in-toto statement (v1) in a DSSE envelope, signed with Ed25519.

The statement lists the SHA-256 and size of each part, and names the version and the installation that exported it. The
signing key is the ledger's, whose public key auditors have already. The signature covers DSSE's pre-authentication
encoding (https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md), so it cannot be confused with the
signature of a checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature

from cluster.errors import ArtifactTampered, ConfigError
from cluster.ledger.chain import canonical
from cluster.ledger.checkpoint import Signer
from cluster.ledger.merkle import TreeHead
from jobs.promotion.archive import Part
from jobs.promotion.trust import TrustedKey
from jobs.train.config import MODEL_NAME

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:falaj:model-bundle:1"
MODEL, INT8 = "model/", "int8/"
"""Folders of the model's files, and of the files that replace them in int8."""
CARD, DEFINITIONS, EVENTS, REFERENCE = (
    "card.json",
    "definitions.json",
    "events.jsonl",
    "reference.safetensors",
)
DOCUMENTS = (CARD, DEFINITIONS, EVENTS, REFERENCE)
_NAME = re.compile(r"(?:(?:model|int8)/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_HASH = re.compile(r"[0-9a-f]{64}")
MAX_PARTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """The installation that exported a bundle."""

    key_id: str
    tier: str
    region: str
    environment: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What the signature of a bundle covers."""

    installation: Installation
    name: str
    version: int
    entry_hash: str
    """Hash of the event that registered the version."""
    exported_at: str
    ledger: TreeHead
    parts: tuple[Part, ...]

    @property
    def sha256(self) -> str:
        """Identifies the bundle."""
        return hashlib.sha256(self.payload()).hexdigest()

    def payload(self) -> bytes:
        """Return the statement as canonical JSON."""
        predicate = {
            "installation": asdict(self.installation),
            "model": {"name": self.name, "version": self.version, "entry_hash": self.entry_hash},
            "exported_at": self.exported_at,
            "ledger": asdict(self.ledger),
            "sizes": {part.name: part.size for part in self.parts},
        }
        return canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": part.name, "digest": {"sha256": part.sha256}} for part in self.parts],
                "predicateType": PREDICATE_TYPE,
                "predicate": predicate,
            }
        )


def describe_parts(parts: Mapping[str, bytes]) -> tuple[Part, ...]:
    """Return name, size and hash of each part."""
    return tuple(
        Part(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(parts.items())
    )


def seal_statement(statement: Statement, signer: Signer) -> bytes:
    """Return the envelope with the signed statement."""
    payload = statement.payload()
    signature = {"keyid": signer.key_id, "sig": signer.sign(pre_authentication_encoding(payload))}
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [signature],
    }
    return canonical(envelope)


def open_statement(
    envelope: bytes, trusted: Mapping[str, TrustedKey], *, advice: str
) -> tuple[Statement, TrustedKey]:
    """Verify an envelope, and return the statement and the key that signed it.

    Args:
        envelope: Content of the envelope.
        trusted: Maps key id to trusted key.
        advice: How to trust a key, for the error message.

    Raises:
        ArtifactTampered: The envelope is damaged, or the signature does not fit the statement.
        ConfigError: The key is not trusted.
    """
    try:
        content = json.loads(envelope)
        payload = base64.b64decode(content["payload"], validate=True)
        (signature,) = content["signatures"]
        key_id, encoded = str(signature["keyid"]), base64.b64decode(signature["sig"], validate=True)
        is_statement = content["payloadType"] == PAYLOAD_TYPE
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactTampered("The bundle's statement is damaged. Copy or export it again.") from error
    key = trusted.get(key_id)
    if key is None:
        raise ConfigError(f"The bundle is signed with key {key_id[:16]!r}, which is not trusted. {advice}")
    try:
        key.public.verify(encoded, pre_authentication_encoding(payload))
    except InvalidSignature:
        raise ArtifactTampered(
            f"The bundle's statement was altered: key {key_id} of '{key.name}' did not sign it. Export it again."
        ) from None
    if not is_statement:
        raise ArtifactTampered(f"The bundle's payload is not {PAYLOAD_TYPE}. Export it again.")
    statement = _parse(payload)
    if statement.installation.key_id != key_id:
        raise ArtifactTampered(f"The bundle's statement names another key than {key_id}, which signed it.")
    return statement, key


def _parse(payload: bytes) -> Statement:
    """Parse a verified statement. Another release may have written it, so its content is checked too."""
    try:
        content: dict[str, Any] = json.loads(payload)
        if content["_type"] != STATEMENT_TYPE or content["predicateType"] != PREDICATE_TYPE:
            raise ValueError(f"unknown type {content['predicateType']!r}")
        predicate = content["predicate"]
        model, sizes = predicate["model"], predicate["sizes"]
        statement = Statement(
            installation=Installation(**predicate["installation"]),
            name=str(model["name"]),
            version=int(model["version"]),
            entry_hash=str(model["entry_hash"]),
            exported_at=str(predicate["exported_at"]),
            ledger=TreeHead(**predicate["ledger"]),
            parts=tuple(
                Part(subject["name"], sizes[subject["name"]], subject["digest"]["sha256"])
                for subject in content["subject"]
            ),
        )
        _check(statement)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactTampered(
            f"The bundle's statement is signed, but this release cannot read it: {error}. Export it with the release "
            "of this installation."
        ) from error
    return statement


def _check(statement: Statement) -> None:
    """Check what paths and sizes are made of."""
    if not MODEL_NAME.fullmatch(statement.name) or statement.version < 1:
        raise ValueError(f"{statement.name!r} version {statement.version} is no model version")
    parts = statement.parts
    names = [part.name for part in parts]
    if len(names) > MAX_PARTS or len(set(names)) != len(names):
        raise ValueError("it has too many parts, or two of one name")
    for part in parts:
        if not _NAME.fullmatch(part.name):
            raise ValueError(f"{part.name!r} is no name of a part")
        if type(part.size) is not int or part.size < 0 or not _HASH.fullmatch(part.sha256):
            raise ValueError(f"size or hash of '{part.name}' is invalid")
    for name in DOCUMENTS:
        if name not in names:
            raise ValueError(f"'{name}' is missing")


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def require_signer(signer: Signer | None) -> Signer:
    """Return the installation's signing key.

    Raises:
        ConfigError: This machine does not have it.
    """
    if signer is None:
        raise ConfigError("The ledger's signing key is only on the head. Run the command there.")
    return signer
