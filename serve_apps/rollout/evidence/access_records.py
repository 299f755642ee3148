"""What one access record says about a unit: its arm, and whether the request failed, was refused or was slow."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from cluster.records.edge_counts.refusals import HOUR
from cluster.records.unit_hash import NO_ROLLOUT
from cluster.security.authorization.policy import Action
from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.assignment import CHAMPION_VARIANT, PREDECESSOR_VARIANT, Arm, is_watch

_ARMS = frozenset(arm.value for arm in Arm)
_EXPERIMENT = frozenset({Arm.treatment.value, Arm.control.value})
_CLIENT_GAVE_UP = ("C", "c")
"""First letters of HAProxy's termination state: the client closed the connection, or sent or read nothing in time."""
_ENDED_WELL = ("-", "L")
"""The answer was complete. `L`: HAProxy answered by itself, and no replica saw the request."""


_UNSET = "-"
"""HAProxy's text for a variable without a value."""


class BrokenRecord(ValueError):
    """A line is no access record, for example because the disk was full while it was written."""


class Request(NamedTuple):
    """A prediction request during a rollout. (A NamedTuple takes half the time of a dataclass.)"""

    ended_ms: int
    rollout: str
    arm: str
    unit: str
    """Hash of the unit; `-` for the arm `none`."""
    below: int
    """The treatment had the buckets below this number."""
    latency_ms: int
    failed: bool
    refused: bool
    gave_up: bool
    by_champion: bool
    """The champion was asked, in or outside the experiment, and not as a fallback. After a promotion: the champion
    before it was asked."""

    @property
    def is_in_experiment(self) -> bool:
        return self.arm in _EXPERIMENT

    def event(self, slow_ms: float) -> UnitEvent | None:
        """Return what the unit had in this request, or None if the answer was good.

        Args:
            slow_ms: The policy's limit. An answer counts as slow if it took longer.
        """
        if self.failed:
            return UnitEvent.failure
        if self.gave_up:
            return UnitEvent.slow
        if self.refused:
            return UnitEvent.refusal
        return UnitEvent.slow if self.latency_ms > slow_ms else None


def load(line: bytes) -> dict[str, Any]:
    """Return the record of a line.

    Raises:
        BrokenRecord: The line is no access record.
    """
    try:
        record = orjson.loads(line)
    except ValueError as error:
        raise BrokenRecord(str(error)) from error
    if not isinstance(record, dict):
        raise BrokenRecord("A record is an object.")
    return record


def parse(line: bytes) -> Request | None:
    """Return the request of a line, or None, as `request_of` does.

    Raises:
        BrokenRecord: The line is no access record.
    """
    return request_of(load(line))


def routed_model(record: Mapping[str, Any]) -> str | None:
    """Return the model if the edge has found its route, so if it exists."""
    return None if record.get("rollout", _UNSET) == _UNSET else record.get("model")


def refusal_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return model and hour of a refused prediction. None if it is none, or if the client has no valid token.

    The edge or a replica has answered with 4xx. A client that gave up was not refused.

    Raises:
        BrokenRecord: A field is missing or wrong.
    """
    try:
        if not 400 <= int(record["status"]) < 500 or record["action"] != Action.predict:
            return None
        if record["principal"] in ("", _UNSET) or record["termination"][0] in _CLIENT_GAVE_UP:
            return None
        if "ended_ms" not in record:  # of an older release
            return None
        ended = dt.datetime.fromtimestamp(int(record["ended_ms"]) / 1000, dt.UTC)
        return str(record["model"]), ended.strftime(HOUR)
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise BrokenRecord(str(error)) from error


def request_of(record: Mapping[str, Any]) -> Request | None:
    """Return a record's request. None if it is no prediction during a rollout, or if the edge itself refused it.

    Records of an older release without `below` are None as well.

    Raises:
        BrokenRecord: A field is missing or wrong.
    """
    try:
        rollout, arm, termination = record["rollout"], record["arm"], record["termination"]
        if rollout in (_UNSET, NO_ROLLOUT) or record["action"] != Action.predict or arm == _UNSET:
            return None
        status, fallback = int(record["status"]), record["fallback"] == "1"
        if arm not in _ARMS:
            raise BrokenRecord(f"There is no arm {arm!r}.")
        if "below" not in record or (termination[0] == "L" and 400 <= status < 500):
            return None
        gave_up = termination[0] in _CLIENT_GAVE_UP and not fallback
        failed = not gave_up and (
            fallback or not 100 <= status < 500 or termination[0] not in (*_ENDED_WELL, *_CLIENT_GAVE_UP)
        )
        return Request(
            ended_ms=int(record["ended_ms"]),
            rollout=rollout,
            arm=arm,
            unit=record["unit_hash"],
            below=int(record["below"]),
            latency_ms=int(record["latency_ms"]),
            failed=failed,
            refused=400 <= status < 500,
            gave_up=gave_up,
            by_champion=record["variant"] == _compared(rollout) and not fallback,
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise BrokenRecord(str(error)) from error


def _compared(rollout: str) -> str:
    """Return the variant that the treatment of a recorded rollout is compared with."""
    return PREDECESSOR_VARIANT if is_watch(rollout) else CHAMPION_VARIANT
