"""`python -m feature_jobs.skew name=m [since=…]`: compute every logged feature vector again offline, and compare.

This is a gate: it exits with 2 if the stored data cannot explain a served value, and with 0 if it explains all served
values. Values that are only late or missing are counted for each feature. `store/skew/comparison.py` lists the possible
explanations (`Verdict`). Features of views with aggregations are not compared yet.
"""

from __future__ import annotations

import bisect
import datetime as dt
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cluster.entrypoint import job
from cluster.errors import RefusedError, SkewFound
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import SkewChecked, ViewMaterialized
from cluster.records.location import prediction_log
from cluster.records.progress import ages_as_json, log_age
from cluster.records.reading import read_records
from cluster.registry import Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout, write_json
from feature_jobs.materialize import parse_as_of
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec, service_spec
from feature_jobs.store.definitions.missing import NO_POLICY
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import build, join_in_process, key_column
from feature_jobs.store.skew.comparison import (
    AS_OF,
    FLOOR_AS_OF,
    FLOOR_SEQ,
    POSITION,
    REQUESTED,
    FeatureSkew,
    Verdict,
    differs,
    explain_differences,
    feature_skew,
)
from feature_jobs.store.skew.served import TIME, ServedRequests, read_served
from feature_jobs.store.skew.window_differences import explain_window_differences
from feature_jobs.store.types.schema import DELETED, INGESTED
from feature_jobs.view_tables import view_snapshot

NUM_EXAMPLES = 20


@dataclass(kw_only=True, slots=True)
class SkewConfig(PlatformConfig):
    """Configuration of `feature_jobs.skew`."""

    name: str = "???"
    """Name of the model."""
    since: str | None = None
    """ISO 8601 instant; earlier predictions are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Materialization:
    """One materialisation of a view into the online store."""

    at: dt.datetime
    seq: int
    """The last `ingest_seq` of the table version that it read."""
    as_of: dt.datetime


class Materializations:
    """The materialisations of a view. They are read one by one, only as far back as necessary.

    Args:
        newest_first: the materialisations, the newest first.
    """

    def __init__(self, newest_first: Iterable[Materialization]) -> None:
        self._read: list[Materialization] = []
        self._unread = iter(newest_first)

    def last_before(self, at: dt.datetime) -> Materialization | None:
        """Return the last materialisation at or before a time, or None if there is none."""
        while not self._read or self._read[-1].at > at:
            earlier = next(self._unread, None)
            if earlier is None:
                break
            self._read.append(earlier)
        # The list is sorted newest first, so the negated times ascend.
        position = bisect.bisect_left(self._read, -at.timestamp(), key=lambda read: -read.at.timestamp())
        return self._read[position] if position < len(self._read) else None


def read_materializations(ledger: Ledger, uri: str, view: str) -> Iterator[Materialization]:
    """Yield a view's materialisations, the newest first.

    If a table version was removed, its materialisation is left out. Then the materialisation before it is used.
    """
    for entry in ledger.find(ViewMaterialized, view=view, newest_first=True):
        try:
            table = DeltaTable(uri, version=entry.payload["table_version"])
        except (DeltaError, ValueError):
            continue
        yield Materialization(
            at=dt.datetime.fromisoformat(entry.time),
            seq=offline.last_seq(table),
            as_of=dt.datetime.fromisoformat(entry.payload["as_of"]),
        )


class OpenedView(NamedTuple):
    """A view's newest rows, and its materialisations."""

    table: Snapshot
    materializations: Materializations


@dataclass(kw_only=True, slots=True)
class SkewResult:
    """The result of a comparison, by feature."""

    rows: int
    left_out: int
    features: dict[str, FeatureSkew]
    without_score: int = 0
    """Number of rows for which the model gave no finite score. They are not compared."""
    examples: list[dict[str, Any]]
    """A few mismatches, each with the prediction's id, the row number and the feature, but without values."""

    @property
    def mismatches(self) -> int:
        return sum(feature.mismatch for feature in self.features.values())


@job("skew", SkewConfig, timed=True)
def main(config: SkewConfig) -> None:
    """Compare a model's served features with the features from offline data."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="feature_jobs.skew")
    places = layout(config.storage)
    since = None if config.since is None else parse_as_of(config.since)
    log = prediction_log(places, ledger, config.name)
    age = log_age(log)
    records = read_records(log, key_store(actor.access))
    groups, left_out, without_score = read_served(records, since)
    if not groups:
        raise RefusedError(
            f"No prediction of '{config.name}' was made from the online store{f' since {since}' if since else ''}: "
            "no data, so no statement."
        )
    registry = Registry(ledger, places)
    result = SkewResult(
        rows=0,
        left_out=left_out,
        without_score=without_score,
        features=defaultdict(FeatureSkew),
        examples=[],
    )
    tables = OfflineTables(config, ledger, actor)
    for group in groups:
        origin = registry.get(config.name, group.version).lineage
        spec = service_spec(ledger, origin.service, origin.service_version)
        # On-demand features depend only on the request and these features. Defaults would hide the values read.
        compare(replace(spec, on_demand=(), missing=NO_POLICY), tables, group, result)
    report = f"{places.skew(config.name)}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    event = checked_event(config, result, report)
    write_json(report, event.payload() | {"examples": result.examples, "logs": ages_as_json([age])})
    ledger.append(event, actor=actor.name)
    print(f"log: {age}")
    print_result(result)
    if result.mismatches:
        raise SkewFound(
            f"Model '{config.name}': {result.mismatches} served values are not what offline data gives for the same "
            f"request. See {report}."
        )


def print_result(result: SkewResult) -> None:
    """Print one line for each feature, and the number of rows that were not compared."""
    for name, feature in result.features.items():
        print(f"{name}: {', '.join(f'{label} {figure}' for label, figure in feature.report().items())}")
    if result.without_score:
        print(f"not compared: {result.without_score} rows that the model gave no finite score for")


def checked_event(config: SkewConfig, result: SkewResult, report: str) -> SkewChecked:
    """Return the event for a comparison."""
    return SkewChecked(
        model=config.name,
        since=config.since,
        rows=result.rows,
        rows_left_out=result.left_out,
        rows_without_score=result.without_score,
        mismatches=result.mismatches,
        features={name: feature.report() for name, feature in result.features.items()},
        report="/".join(report.rsplit("/", 3)[1:]),
    )


class OfflineTables:
    """The views' tables and materialisations. Each view is opened once."""

    def __init__(self, config: SkewConfig, ledger: Ledger, actor: Actor) -> None:
        self._config = config
        self._ledger = ledger
        self._actor = actor
        self._opened: dict[tuple[str, str], OpenedView] = {}

    def open(self, view: ViewSpec) -> OpenedView:
        """Return a view's newest rows and its materialisations.

        Raises:
            AccessDenied: the policies do not permit the caller to join the view.
            TrainingSetError: the view has no rows.
        """
        if (view.name, view.version) not in self._opened:
            self._actor.check(
                Action.build_training_set, *view_resources(view, region=self._config.cluster.region)
            )
            table = view_snapshot(view, layout(self._config.storage), self._actor.access)
            self._opened[view.name, view.version] = OpenedView(
                table, Materializations(read_materializations(self._ledger, table.uri, view.name))
            )
        return self._opened[view.name, view.version]


def compare(spec: ServiceSpec, tables: OfflineTables, group: ServedRequests, result: SkewResult) -> None:
    """Compute the features of some requests again offline, compare them with the served features, update `result`."""
    opened = {view.name: tables.open(view) for view in spec.views}
    pinned = {name: view.table for name, view in opened.items()}
    joined = build(spec, pinned, group.entity_rows(spec), join_parts=join_in_process)
    result.rows += len(group.ids)
    for view in spec.views:
        if view.windows is not None:  # an aggregate is made of many events, so no single row can explain it
            continue
        requests = request_frame(view, spec, joined, opened[view.name], group)
        for field, name in zip(view.fields, view.columns, strict=True):
            if name not in group.features or name in group.client_inputs:
                continue
            online, offline_values = group.column(name, field), pl.Series(pl.from_arrow(joined[name]))
            verdicts = verdicts_of(view, field.name, online, offline_values, requests, pinned[view.name])
            result.features[name] += feature_skew(online, offline_values, verdicts)
            mismatches = (verdicts == Verdict.mismatch.value).arg_true().to_list()
            for index in mismatches[: NUM_EXAMPLES - len(result.examples)]:
                prediction_id, row = group.ids[index]
                result.examples.append({"prediction_id": prediction_id, "row": row, "feature": name})


def verdicts_of(
    view: ViewSpec,
    feature: str,
    online: pl.Series,
    offline_values: pl.Series,
    requests: pl.DataFrame,
    pinned: Snapshot,
) -> pl.Series:
    """Return one `Verdict` per served value. Older rows of an entity are read only if its values differ."""
    verdicts = [Verdict.equal.value] * len(online)
    differing_requests = requests.filter(differs(online, offline_values))
    if differing_requests.is_empty():
        return pl.Series(verdicts)
    keys = list(pinned.key_types)
    ttl = None if view.ttl_s is None else dt.timedelta(seconds=view.ttl_s)
    key_table = differing_requests.select(keys).to_arrow()
    buckets = pl.Series(bucket_of(key_table, keys, num_buckets=pinned.num_buckets))
    for bucket in buckets.unique().to_list():
        part = differing_requests.filter(buckets == bucket)
        if view.windows is None:
            history = without_tombstone_values(pinned.read(bucket, [INGESTED, feature]), feature)
        else:
            history = pinned.read(bucket, view.windows.table_columns)
        if history.is_empty():  # offline has no entity in this bucket, but a value was served
            for position in part[POSITION]:
                verdicts[position] = Verdict.offline_missing.value
            continue
        served_values = online.gather(part[POSITION])
        if view.windows is None:
            judged = explain_differences(
                part, history, keys=keys, feature=feature, online=served_values, ttl=ttl
            )
        else:
            judged = explain_window_differences(
                part, history, keys=keys, windows=view.windows, feature=feature, online=served_values
            )
        for position, verdict in judged.iter_rows():
            verdicts[position] = verdict
    return pl.Series(verdicts)


def without_tombstone_values(history: pl.DataFrame, feature: str) -> pl.DataFrame:
    """Return the rows with null in place of a tombstone's value."""
    if DELETED not in history.columns:
        return history
    return history.with_columns(
        pl.when(~pl.col(DELETED).fill_null(False)).then(pl.col(feature)).alias(feature)
    )


def request_frame(
    view: ViewSpec, spec: ServiceSpec, joined: pa.Table, opened: OpenedView, group: ServedRequests
) -> pl.DataFrame:
    """Return keys, times and the last materialisation of each request, as `explain_differences` needs them."""
    keys = {key: key_column(key, kind, view, spec, joined) for key, kind in opened.table.key_types.items()}
    frame = pl.DataFrame(pl.from_arrow(pa.table(keys))).with_row_index(POSITION)
    before = [opened.materializations.last_before(at) for at in group.requested]
    return frame.with_columns(
        pl.Series(AS_OF, group.as_of, TIME),
        pl.Series(REQUESTED, group.requested, TIME),
        pl.Series(FLOOR_SEQ, [last.seq if last else None for last in before], pl.Int64),
        pl.Series(FLOOR_AS_OF, [last.as_of if last else None for last in before], TIME),
    )


if __name__ == "__main__":
    main()
