"""The units of one cohort with their logged answers, as plain data."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.records.columns import OTHER
from cluster.records.schema import SHADOW
from serve_apps.rollout.assignment import Arm

EXPERIMENT = (Arm.treatment.value, Arm.control.value)
MIRRORED = (Arm.outside.value, SHADOW)
"""Arms of a shadow's rollout: the champion's answers, and the copies."""
COLUMNS = (
    *(
        "prediction_id",
        "request_id",
        "time",
        "as_of",
        "version",
        "rollout",
        "arm",
        "unit_hash",
        "predictions",
    ),
    OTHER,
)


class Answer(NamedTuple):
    """One logged prediction of the experiment."""

    prediction_id: str
    request_id: str
    time: dt.datetime
    as_of: dt.datetime | None
    version: int
    predictions_json: str
    features_json: str
    fault: str
    took_ms: float
    cpu_ms: float

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """One prediction for each row; [] if there is no answer."""
        return [] if self.fault else orjson.loads(self.predictions_json)

    @property
    def features(self) -> dict[str, list[Any]]:
        """Maps input to one value for each row; {} if the reader did not ask for the features."""
        return orjson.loads(self.features_json) if self.features_json else {}


@dataclass(kw_only=True, slots=True)
class UnitRows:
    """What a cohort knows of one unit."""

    arm: str
    first: Answer
    """The unit's first record in the experiment, also if the model gave no answer."""
    answers: list[Answer] = field(default_factory=list)
    copies: dict[str, Answer] = field(default_factory=dict)
    """Only of a shadow: its answer to each of these requests, by the request's id."""


def _answer(row: Mapping[str, Any]) -> Answer:
    other = {} if row[OTHER] is None else orjson.loads(row[OTHER])
    return Answer(
        prediction_id=row["prediction_id"],
        request_id=row["request_id"] or "",
        time=row["time"],
        as_of=row["as_of"],
        version=row["version"],
        predictions_json=row["predictions"],
        features_json=row.get("features") or "",
        fault=str(other.get("fault") or ""),
        took_ms=float(other.get("took_ms") or 0.0),
        cpu_ms=float(other.get("cpu_ms") or 0.0),
    )


def experiment_rows(rows: pa.Table, rollout: str, arms: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the records of these arms of a rollout. Requests without a unit have the arm `none`."""
    of_arms = pc.is_in(rows["arm"], value_set=pa.array(arms))
    return rows.filter(pc.and_(of_arms, pc.equal(rows["rollout"], rollout))).to_pylist()  # type: ignore[no-any-return]


def units_of_arms(rows: Iterable[Mapping[str, Any]]) -> dict[str, UnitRows]:
    """Return the units of treatment and control with their answers."""
    found: dict[str, UnitRows] = {}
    for row in rows:
        answer = _answer(row)
        unit = found.setdefault(row["unit_hash"], UnitRows(arm=row["arm"], first=answer))
        if answer.time < unit.first.time:
            unit.first = answer
        if not answer.fault:
            unit.answers.append(answer)
    return found


def units_of_shadow(rows: Iterable[Mapping[str, Any]], *, version: int) -> dict[str, UnitRows]:
    """Return the units that have an answer of the champion and the shadow's copy of the same request.

    Args:
        rows: Records of the champion and of the shadow.
        version: The shadow's version. Copies for an earlier shadow do not count.
    """
    answers: dict[str, list[Answer]] = {}
    copies: dict[str, Answer] = {}
    for row in rows:
        answer = _answer(row)
        if row["arm"] != SHADOW:
            if not answer.fault:
                answers.setdefault(row["unit_hash"], []).append(answer)
        elif answer.version == version:
            # A copy can have two records: the shadow's own, and that of the replica which got no good answer.
            known = copies.get(answer.request_id)
            if known is None or (answer.fault and not known.fault):
                copies[answer.request_id] = answer
    found = {}
    for name, given in answers.items():
        paired = [answer for answer in given if answer.request_id in copies]
        if paired:
            found[name] = UnitRows(
                arm=Arm.treatment.value,
                first=min(paired, key=lambda answer: answer.time),
                answers=paired,
                copies={answer.request_id: copies[answer.request_id] for answer in paired},
            )
    return found
