"""The hash chain of ledger entries: canonical JSON (RFC 8785) and SHA-256, without database access.

An entry's `hash` covers all its other fields. One of these fields is `prev_hash`, the hash of the previous entry. So a
changed, removed or reordered entry breaks every later hash. If the last entries are removed, only a checkpoint that is
stored elsewhere reveals it.
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
    """Sequence number, from 1, without gaps."""
    time: str
    """ISO 8601, UTC, microseconds."""
    type: str
    actor: str
    payload: dict[str, Any]
    prev_hash: str
    hash: str

    def event(self) -> LedgerEvent:
        """Return the typed event."""
        return parse(self.type, self.payload, seq=self.seq)

    def line(self) -> str:
        """Return the entry as one line of an export."""
        return canonical(asdict(self)).decode()


def canonical(value: Any) -> bytes:
    """Return a value as canonical JSON (RFC 8785).

    Raises:
        ValueError: JSON cannot represent the value, for example NaN.
    """
    return rfc8785.dumps(value)


def to_json(value: Any) -> Any:
    """Convert a value to JSON for the ledger: integers beyond 2^53 become strings, NaN and infinities become null."""
    match value:
        case bool() | None | str():
            return value
        case int():
            return value if abs(value) <= MAX_SAFE_INTEGER else str(value)
        case float() if not math.isfinite(value):
            return None
        case float():
            # JSON writes a large whole float as an integer, and it would be read back as an integer.
            return str(int(value)) if value.is_integer() and abs(value) > MAX_SAFE_INTEGER else value
        case dict():
            return {str(key): to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
        case _:
            raise TypeError(f"An event cannot hold {type(value).__name__} {value!r}; give plain JSON values.")


def build_entry(
    *, seq: int, time: str, type: str, actor: str, payload: dict[str, Any], prev_hash: str
) -> Entry:
    """Build the entry that follows the entry whose hash is `prev_hash`."""
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


def verify_chain(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries, and verify that each entry follows the previous entry.

    Raises:
        LedgerCorrupt: An entry is missing or changed. The error has the `seq` of the first such entry.
    """
    prev_hash = GENESIS
    for position, entry in enumerate(entries, start=1):
        if entry.seq != position:
            raise LedgerCorrupt(f"Event {position} is missing: found seq {entry.seq} instead.", seq=position)
        if entry.prev_hash != prev_hash:
            raise LedgerCorrupt(
                f"Event {entry.seq} does not follow event {entry.seq - 1}: prev_hash differs.", seq=entry.seq
            )
        if not has_own_hash(entry):
            raise LedgerCorrupt(
                f"Event {entry.seq} was changed: its hash does not match its content.", seq=entry.seq
            )
        prev_hash = entry.hash
        yield entry


def has_own_hash(entry: Entry) -> bool:
    """Return whether an entry's hash is the hash of its other fields."""
    body = asdict(entry)
    del body["hash"]
    return hashlib.sha256(canonical(body)).hexdigest() == entry.hash


def read_lines(lines: Iterable[str]) -> Iterator[Entry]:
    """Parse the entries of an export.

    Raises:
        LedgerCorrupt: A line is not a ledger entry.
    """
    for position, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            yield Entry(**{name: fields[name] for name in FIELDS})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LedgerCorrupt(
                f"Line {position} of the export is not a ledger entry: {error!r}.", seq=position
            ) from error
        if len(fields) != len(FIELDS):
            raise LedgerCorrupt(f"Line {position} of the export has unknown fields.", seq=position)
