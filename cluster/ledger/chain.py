"""The hash chain: canonical JSON (RFC 8785), SHA-256, and nothing that touches a database.

An entry's hash covers all its fields but the hash itself, and its `prev_hash` is that of the entry before; changing,
removing or reordering an entry breaks every hash after it. A cut-off tail shows only against a checkpoint kept
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import rfc8785

from cluster.errors import LedgerCorrupt
from cluster.ledger.events import LedgerEvent, parse

GENESIS = "0" * 64
MAX_SAFE_INTEGER = 2**53 - 1
FIELDS = ("seq", "time", "type", "actor", "payload", "prev_hash", "hash")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the ledger."""

    seq: int
    """From 1, without gaps."""
    time: str
    """ISO 8601, UTC, microseconds."""
    type: str
    actor: str
    payload: dict[str, Any]
    prev_hash: str
    hash: str

    def event(self) -> LedgerEvent:
        """The typed event."""
        return parse(self.type, self.payload, seq=self.seq)

    def line(self) -> str:
        """The entry as one line of an export."""
        return canonical(asdict(self)).decode()


def canonical(value: Any) -> bytes:
    """RFC 8785 canonical JSON.

    Raises:
        ValueError: a value that JSON cannot hold, a NaN for one.
    """
    return rfc8785.dumps(value)


def plain(value: Any) -> Any:
    """A value as it stands in the ledger: whole numbers beyond 2^53 become strings, NaN and infinities null."""
    match value:
        case bool() | None | str():
            return value
        case int():
            return value if abs(value) <= MAX_SAFE_INTEGER else str(value)
        case float() if not math.isfinite(value):
            return None
        case float():
            # A large whole float is written as an integer literal, and would be read back as one.
            return str(int(value)) if value.is_integer() and abs(value) > MAX_SAFE_INTEGER else value
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            raise TypeError(f"An event cannot hold {type(value).__name__} {value!r}; give plain JSON values.")


def link(*, seq: int, time: str, type: str, actor: str, payload: dict[str, Any], prev_hash: str) -> Entry:
    """The entry that follows `prev_hash`."""
    body = {
        "seq": seq,
        "time": time,
        "type": type,
        "actor": actor,
        "payload": payload,
        "prev_hash": prev_hash,
    }
    digest = hashlib.sha256(canonical(body)).hexdigest()
    return Entry(
        seq=seq, time=time, type=type, actor=actor, payload=payload, prev_hash=prev_hash, hash=digest
    )


def check(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Pass entries on, each proven to follow the one before.

    Raises:
        LedgerCorrupt: naming the first bad `seq`.
    """
    prev_hash = GENESIS
    for position, entry in enumerate(entries, start=1):
        if entry.seq != position:
            raise LedgerCorrupt(
                f"Event {position} is missing: found seq {entry.seq} in its place.", seq=position
            )
        if entry.prev_hash != prev_hash:
            raise LedgerCorrupt(
                f"Event {entry.seq} does not follow event {entry.seq - 1}: prev_hash differs.", seq=entry.seq
            )
        body = asdict(entry)
        del body["hash"]
        if hashlib.sha256(canonical(body)).hexdigest() != entry.hash:
            raise LedgerCorrupt(
                f"Event {entry.seq} was changed: its hash does not fit its content.", seq=entry.seq
            )
        prev_hash = entry.hash
        yield entry


def read_lines(lines: Iterable[str]) -> Iterator[Entry]:
    """The entries of an export.

    Raises:
        LedgerCorrupt: a line that is no entry.
    """
    for position, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            yield Entry(**{name: fields[name] for name in FIELDS})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LedgerCorrupt(
                f"Line {position} of the export is no ledger entry: {error!r}.", seq=position
            ) from error
        if len(fields) != len(FIELDS):
            raise LedgerCorrupt(f"Line {position} of the export has unknown fields.", seq=position)
