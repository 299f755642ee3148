"""Finds the events after which a schedule runs: in the ledger, or among the files below a URI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec

from cluster.errors import ConfigError, first_line
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import ModelMonitored, OutcomesSummed, PipelineFinished, QualityJudged
from cluster.storage import resolve
from jobs.schedule.config import TriggerKind, TriggerSpec

MAX_FILES = 100_000
"""Largest number of files that a trigger reads the names of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Triggered:
    """Something happened after which a schedule runs."""

    position: str
    reason: str


def detect(
    trigger: TriggerSpec, ledger: Ledger, *, position: str, since: int, is_running: bool
) -> Triggered | None:
    """Return what happened after a position, or None if nothing happened.

    Several events since the last slot start one run.

    Args:
        trigger: What to detect.
        ledger: The ledger.
        position: The schedule's position; "" before its first slot.
        since: `seq` of the event that applied or resumed the schedule.
        is_running: Whether a slot of this schedule is not finished.
    """
    after = int(position) if position.isdecimal() else since
    match trigger.kind:
        case TriggerKind.pipeline:
            return _newest(ledger, PipelineFinished, after, lambda payload: _is_done(payload, trigger.of))
        case TriggerKind.drift:
            drift = _newest(ledger, ModelMonitored, after, lambda payload: _has_drift(payload, trigger.of))
            harm = _newest(ledger, QualityJudged, after, lambda payload: _has_harm(payload, trigger.of))
            return max(drift, harm, key=lambda one: int(one.position) if one else 0)
        case TriggerKind.outcomes:
            return _outcomes(ledger, trigger, after)
        case TriggerKind.data:
            return _data(trigger.of, position)
        case TriggerKind.always:
            return None if is_running else Triggered(position=str(ledger.head()), reason="always")


def check_uri(uri: str) -> None:
    """Require that a trigger can look at a URI.

    Raises:
        ConfigError: Its protocol is unknown, or lacks a package. Whether there are files is not checked.
    """
    try:
        fsspec.core.url_to_fs(resolve(uri))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"schedule.trigger.of: '{uri}' cannot be read: {first_line(error)}.") from error


def snapshot(uri: str) -> str:
    """Return a hash of the names, sizes and times of change of the files below a URI.

    Raises:
        ConfigError: There are more than `MAX_FILES` files.
    """
    filesystem, path = fsspec.core.url_to_fs(resolve(uri), use_listings_cache=False)
    files = sorted(filesystem.find(path, detail=True).items()) if filesystem.exists(path) else []
    if len(files) > MAX_FILES:
        raise ConfigError(
            f"{uri} has {len(files)} files; a trigger can watch {MAX_FILES} at most. Name a folder."
        )
    content = [
        (name, details.get("size"), str(details.get("ETag") or details.get("mtime") or ""))
        for name, details in files
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _data(uri: str, position: str) -> Triggered | None:
    current = snapshot(uri)
    return None if current == position else Triggered(position=current, reason=f"new data in {uri}")


def _newest(
    ledger: Ledger, kind: type[Any], after: int, matches: Callable[[dict[str, Any]], str]
) -> Triggered | None:
    found: tuple[Entry, str] | None = None
    for entry in ledger.entries(kind, after=after):
        if reason := matches(entry.payload):
            found = entry, reason
    return None if found is None else Triggered(position=str(found[0].seq), reason=found[1])


def _is_done(payload: dict[str, Any], pipeline: str) -> str:
    is_done = payload["pipeline"] == pipeline and payload["state"] == "done"
    return f"run {payload['run']} of pipeline {pipeline} is done" if is_done else ""


def _has_drift(payload: dict[str, Any], model: str) -> str:
    """Return the reason if an input, all inputs together or the answers of a model have drifted."""
    if payload["model"] != model:
        return ""
    alerts = sorted(
        name
        for figures in (payload["drift"], payload.get("missing", {}), payload.get("unseen", {}))
        for name, chunks in figures.items()
        if chunks
    )
    if payload.get("reconstruction"):
        alerts.append("all inputs together")
    return f"drift of model {model}: {', '.join(alerts)[:200]}" if alerts else ""


def _has_harm(payload: dict[str, Any], model: str) -> str:
    """Return the reason if all versions of a model have become worse, so that no rollback helps."""
    if payload["model"] != model or payload["verdict"] != "retrain":
        return ""
    return f"harm of all versions of model {model}: {'; '.join(payload['reasons'])[:200]}"


def _outcomes(ledger: Ledger, trigger: TriggerSpec, after: int) -> Triggered | None:
    total, last = 0, after
    for entry in ledger.entries(OutcomesSummed, after=after):
        if entry.payload["model"] == trigger.of:
            total, last = total + int(entry.payload["accepted"]), entry.seq
    if total < trigger.count:
        return None
    return Triggered(position=str(last), reason=f"{total} outcomes of model {trigger.of}")
