"""`python -m feature_jobs.skew name=m [since=…]`: every logged feature vector computed again, offline.

A gate: it exits 2 where a served value cannot be explained by what the platform stored, and 0 where all can. What only
lags behind or is missing is counted beside it, for each feature. `comparison.py` says what is called what. Features of
aggregated views are not compared yet.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cluster.entrypoint import job
from cluster.errors import RefusedError, SkewFound
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import SkewChecked, ViewMaterialized
from cluster.records import read_records
from cluster.registry import Registry
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, local, write_json
from feature_jobs.materialize import instant
from feature_jobs.store.catalog.protection import view_protection, view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec, service_spec
from feature_jobs.store.definitions.missing import NO_POLICY
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.tables import Snapshot, snapshot
from feature_jobs.store.offline.training_set import build, join_here, key_column
from feature_jobs.store.skew.comparison import (
    AS_OF,
    FLOOR_AS_OF,
    FLOOR_SEQ,
    INGESTED,
    POSITION,
    REQUESTED,
    FeatureSkew,
    Verdict,
    differing,
    judge,
    skew_of,
)
from feature_jobs.store.skew.served import TIME, Served, served
from feature_jobs.store.skew.windows import judge_windows
from feature_jobs.store.types.schema import DELETED

NUM_EXAMPLES = 20


@dataclass(kw_only=True, slots=True)
class SkewConfig(PlatformConfig):
    """Whose predictions."""

    name: str = "???"
    """Of the model."""
    since: str | None = None
    """ISO 8601 instant; earlier predictions are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """What a materialisation put into the online store."""

    at: dt.datetime
    seq: int
    """The last `ingest_seq` of the table version that it read."""
    as_of: dt.datetime


@dataclass(kw_only=True, slots=True)
class Result:
    """What came out, feature by feature."""

    rows: int
    left_out: int
    features: dict[str, FeatureSkew]
    without_score: int = 0
    """Rows that the model gave no answer to; they are not compared."""
    examples: list[dict[str, Any]]
    """Some mismatches: which prediction, which row, which feature; no values."""

    @property
    def mismatches(self) -> int:
        return sum(one.mismatch for one in self.features.values())


@job("skew", SkewConfig, timed=True)
def main(config: SkewConfig) -> None:
    """Hold a model's served features against offline ones."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.skew")
    places = layout(config.storage)
    since = None if config.since is None else instant(config.since)
    records = read_records(local(places.predictions(config.name)), key_store(actor.access))
    groups, left_out, without_score = served(records, since)
    if not groups:
        raise RefusedError(
            f"No prediction of '{config.name}' was made from the online store{f' since {since}' if since else ''}: "
            "no data, so no statement."
        )
    registry = Registry(ledger, places)
    result = Result(
        rows=0,
        left_out=left_out,
        without_score=without_score,
        features=defaultdict(FeatureSkew),
        examples=[],
    )
    tables = Offline(config, ledger, actor)
    for group in groups:
        origin = registry.get(config.name, group.version).lineage
        spec = service_spec(ledger, origin.service, origin.service_version)
        # What is made on demand is a function of the request and of these, and defaults stand in for what was read.
        compare(replace(spec, on_demand=(), missing=NO_POLICY), tables, group, result)
    report = f"{places.skew(config.name)}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    event = event_of(config, result, report)
    write_json(report, event.payload() | {"examples": result.examples})
    ledger.append(event, actor=actor.name)
    for name, one in result.features.items():
        print(f"{name}: {', '.join(f'{what} {figure}' for what, figure in one.report().items())}")
    if result.without_score:
        print(f"not compared: {result.without_score} rows that the model gave no finite score for")
    if result.mismatches:
        raise SkewFound(
            f"Model '{config.name}': {result.mismatches} served values are not what offline data gives for the same "
            f"request. See {report}."
        )


def event_of(config: SkewConfig, result: Result, report: str) -> SkewChecked:
    """What is said in the ledger."""
    return SkewChecked(
        model=config.name,
        since=config.since,
        rows=result.rows,
        rows_left_out=result.left_out,
        rows_without_score=result.without_score,
        mismatches=result.mismatches,
        features={name: one.report() for name, one in result.features.items()},
        report="/".join(report.rsplit("/", 3)[1:]),
    )


class Offline:
    """The views' tables and materialisations, each opened once."""

    def __init__(self, config: SkewConfig, ledger: Ledger, actor: Actor) -> None:
        self._config = config
        self._ledger = ledger
        self._actor = actor
        self._opened: dict[tuple[str, str], tuple[Snapshot, list[Floor]]] = {}

    def open(self, view: ViewSpec) -> tuple[Snapshot, list[Floor]]:
        """A view's newest rows, and what was materialised of it.

        Raises:
            AccessDenied: the policies do not permit to join it.
            TrainingSetError: it has no rows.
        """
        if (view.name, view.version) not in self._opened:
            self._actor.check(
                Action.build_training_set, *view_resources(view, region=self._config.cluster.region)
            )
            pinned = snapshot(
                layout(self._config.storage).features(view.name),
                view=view.name,
                keys=view.join_keys,
                protection=view_protection(view),
                access=self._actor.access,
            )
            self._opened[view.name, view.version] = pinned, floors(self._ledger, pinned.uri, view.name)
        return self._opened[view.name, view.version]


def compare(spec: ServiceSpec, tables: Offline, group: Served, result: Result) -> None:
    """Ask one group's requests again, and add what comes out to the result."""
    opened = {view.name: tables.open(view) for view in spec.views}
    pinned = {name: one for name, (one, _) in opened.items()}
    joined = build(spec, pinned, group.asked(spec), join_parts=join_here)
    result.rows += len(group.ids)
    for view in spec.views:
        if (
            view.windows is not None
        ):  # made of many events, so no single row of its history can excuse a value
            continue
        table, known = opened[view.name]
        frame = requests(view, spec, joined, table, group, known)
        for field, name in zip(view.fields, view.columns, strict=True):
            if name not in group.features or name in group.given:
                continue
            online, now = group.column(name, field), pl.Series(pl.from_arrow(joined[name]))
            verdicts = verdicts_of(view, field.name, online, now, frame, table)
            result.features[name] += skew_of(online, now, verdicts)
            wrong = (verdicts == Verdict.mismatch.value).arg_true().to_list()
            for place in wrong[: NUM_EXAMPLES - len(result.examples)]:
                prediction_id, row = group.ids[place]
                result.examples.append({"prediction_id": prediction_id, "row": row, "feature": name})


def verdicts_of(
    view: ViewSpec, feature: str, online: pl.Series, now: pl.Series, frame: pl.DataFrame, pinned: Snapshot
) -> pl.Series:
    """The verdict on each served value; only where it differs is the entity's history read."""
    verdicts = [Verdict.equal.value] * len(online)
    differs = differing(online, now)
    asked = frame.filter(differs)
    if asked.is_empty():
        return pl.Series(verdicts)
    keys = list(pinned.key_types)
    ttl = None if view.ttl_s is None else dt.timedelta(seconds=view.ttl_s)
    buckets = pl.Series(bucket_of(asked.select(keys).to_arrow(), keys, num_buckets=pinned.num_buckets))
    for bucket in buckets.unique().to_list():
        part = asked.filter(buckets == bucket)
        if view.windows is None:
            history = values_of(pinned.read(bucket, [INGESTED, feature]), feature)
        else:
            history = pinned.read(bucket, view.windows.read)
        if history.is_empty():  # offline knows nothing of anybody there, so what differs was served
            for position in part[POSITION]:
                verdicts[position] = Verdict.offline_missing.value
            continue
        given = online.gather(part[POSITION])
        if view.windows is None:
            judged = judge(part, history, keys=keys, feature=feature, online=given, ttl=ttl)
        else:
            judged = judge_windows(
                part, history, keys=keys, windows=view.windows, feature=feature, online=given
            )
        for position, verdict in judged.iter_rows():
            verdicts[position] = verdict
    return pl.Series(verdicts)


def values_of(history: pl.DataFrame, feature: str) -> pl.DataFrame:
    """Rows of which a tombstone says nothing, whatever else it may hold."""
    if DELETED not in history.columns:
        return history
    return history.with_columns(
        pl.when(~pl.col(DELETED).fill_null(False)).then(pl.col(feature)).alias(feature)
    )


def requests(
    view: ViewSpec, spec: ServiceSpec, joined: pa.Table, pinned: Snapshot, group: Served, known: list[Floor]
) -> pl.DataFrame:
    """What `judge` wants to know of each request but the values."""
    keys = {key: key_column(key, kind, view, spec, joined) for key, kind in pinned.key_types.items()}
    frame = pl.DataFrame(pl.from_arrow(pa.table(keys))).with_row_index(POSITION)
    before = [
        max((one for one in known if one.at <= at), key=lambda one: one.at, default=None)
        for at in group.requested
    ]
    return frame.with_columns(
        pl.Series(AS_OF, group.as_of, TIME),
        pl.Series(REQUESTED, group.requested, TIME),
        pl.Series(FLOOR_SEQ, [one.seq if one else None for one in before], pl.Int64),
        pl.Series(FLOOR_AS_OF, [one.as_of if one else None for one in before], TIME),
    )


def floors(ledger: Ledger, uri: str, view: str) -> list[Floor]:
    """A view's materialisations; where the table version of one is gone, the one before it has to do."""
    found = []
    for entry in ledger.entries(ViewMaterialized):
        if entry.payload["view"] != view:
            continue
        try:
            table = DeltaTable(uri, version=entry.payload["table_version"])
        except (DeltaError, ValueError):
            continue
        as_of = dt.datetime.fromisoformat(entry.payload["as_of"])
        at = dt.datetime.fromisoformat(entry.time)
        found.append(Floor(at=at, seq=offline.last_seq(table), as_of=as_of))
    return found


if __name__ == "__main__":
    main()
