"""The incremental reader of one edge's access files.

A pass reads at most some MiB from the stored position on, and stores counts and position in one transaction. If a
process is killed, the next pass starts from the stored position. If two processes of one edge read at the same time,
only one of them can store. A pass that fails changes nothing, and the records stay in their files. If what was stored
is lost or was removed, such as a deleted `evidence.db`, the files are read again from their beginning.

Memory is bounded: a pass holds its own records only, and the units that were stored last (`_Known`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cluster.ledger.database import updating
from cluster.records.edge_counts.database import (
    do_not_flush,
    ensure_tables,
    evidence_engine,
    remove_if_broken,
    upsert,
)
from cluster.records.edge_counts.refusals import REFUSALS, RefusalKey, add_refusals, remove_refusals
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.evidence.access_files import Rotation, is_complete, list_files
from serve_apps.rollout.evidence.access_records import (
    BrokenRecord,
    Request,
    load,
    refusal_of,
    request_of,
    routed_model,
)
from serve_apps.rollout.evidence.activity import Activity
from serve_apps.rollout.evidence.sizes import add_sizes, admit
from serve_apps.rollout.evidence.tables import (
    FILES,
    READERS,
    EventOfUnit,
    UnitOfRollout,
    add_events,
    add_units,
    counted_rollouts,
)

INTERVAL_S = 0.5
MAX_BYTES = 4 * 2**20
"""Bytes of one pass: 10,000 records. A reader that has more to read goes on with the next pass."""
MAX_LINE = 5_000
"""Greatest length of a record in bytes. HAProxy cuts records at 4,096."""
MAX_KNOWN = 100_000
FORGET_MS = 7 * 86_400_000
"""A rollout without a request for this long is removed from the edge's activities."""
STOP_S = 5.0
LOG = logging.getLogger("falaj.evidence")


class OtherReader(RuntimeError):
    """Another process has read the files of this edge since the pass began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePosition:
    """How much of a file was read."""

    position: int = 0
    """In bytes."""
    records: int = 0
    """Number of good lines."""
    broken: int = 0
    """Number of lines that are no records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Result of a pass."""

    records: int = 0
    """Number of good lines."""
    broken: int = 0
    """Number of lines that are no records."""
    behind_bytes: int = 0
    """Bytes that were not read yet. They are read in the next passes."""
    removed: tuple[str, ...] = ()
    """Names of removed files."""


class _Known:
    """Units that were stored last, so that their next requests need no statement. Bounded: the oldest are forgotten."""

    def __init__(self) -> None:
        self._below: dict[UnitOfRollout, int] = {}

    def without_known(
        self, units: Mapping[UnitOfRollout, tuple[int, int]]
    ) -> dict[UnitOfRollout, tuple[int, int]]:
        return {unit: found for unit, found in units.items() if self._below.get(unit) != found[0]}

    def add(self, units: Mapping[UnitOfRollout, tuple[int, int]]) -> None:
        self._below |= {unit: below for unit, (below, _) in units.items()}
        while len(self._below) > MAX_KNOWN:
            self._below.pop(next(iter(self._below)))


@dataclass(kw_only=True, slots=True)
class _State:
    """What is stored about an edge."""

    passes: int = 0
    files: dict[str, FilePosition] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    """Models that exist. A client can request any name, and not each may get a row."""
    changed: set[str] = field(default_factory=set)
    """Names of the files whose positions are not stored yet."""
    activities: dict[str, Activity] = field(default_factory=dict)
    known: _Known = field(default_factory=_Known)
    """Forgotten after an error with all else: their rows may be lost."""


@dataclass(kw_only=True, slots=True)
class _Read:
    """What a pass has read."""

    requests: list[Request] = field(default_factory=list)
    refusals: dict[RefusalKey, int] = field(default_factory=dict)
    """Numbers of refused requests, also for models that do not exist."""
    begun: set[str] = field(default_factory=set)
    """Names of the files that were read from their beginning."""

    def add(self, line: bytes, models: set[str], *, file: str) -> None:
        """Add a line, and to `models` the model that the edge found.

        Raises:
            BrokenRecord: The line is no access record.
        """
        record = load(line)
        request, refusal = request_of(record), refusal_of(record)
        if (model := routed_model(record)) is not None:
            models.add(model)
        if request is not None:
            self.requests.append(request)
        if refusal is not None:
            key = RefusalKey(file, *refusal)
            self.refusals[key] = self.refusals.get(key, 0) + 1


@dataclass(kw_only=True, slots=True)
class _Found:
    """What a pass has found."""

    events: dict[EventOfUnit, tuple[str, int, int]] = field(default_factory=dict)
    units: dict[UnitOfRollout, tuple[int, int]] = field(default_factory=dict)

    def add(self, request: Request, slow_ms: float) -> None:
        """Add a request of the experiment."""
        event = request.event(slow_ms)
        if event is not None:
            key = (request.rollout, event, request.unit)
            last = self.events.get(key, ("", 0, 0))
            self.events[key] = max(
                last, (request.arm, request.below, request.ended_ms), key=lambda at: at[1:]
            )
        if request.arm == Arm.treatment:
            unit = (request.rollout, request.unit)
            below, first_ms = self.units.get(unit, (0, 0))
            if request.below > below or (request.below == below and request.ended_ms < first_ms):
                self.units[unit] = (request.below, request.ended_ms)


class Reader:
    """Reads the access files of one edge.

    Args:
        engine: The ledger's engine.
        folder: The edge's access files.
        edge: Id of the edge.
        rotation: How long complete files stay.
    """

    def __init__(self, engine: sa.Engine, folder: Path, *, edge: str, rotation: Rotation) -> None:
        self._engine = evidence_engine(engine)
        self._folder = folder
        self._edge = edge
        self._rotation = rotation
        self._state: _State | None = None

    def collect(self, *, max_bytes: int = MAX_BYTES) -> Collected:
        """Read new records, and store counts and position in one transaction.

        Raises:
            SQLAlchemyError: the database does not answer. Nothing was stored.
            OSError: a file cannot be read. Nothing was stored.
            OtherReader: another process reads the files of this edge. Nothing was stored.
        """
        try:
            return self._collect(max_bytes)
        except sa.exc.DatabaseError as error:
            remove_if_broken(self._engine, error)
            raise

    def _collect(self, max_bytes: int) -> Collected:
        state, self._state = self._current_state(), None  # after an error, it is loaded again
        paths = {path.name: path for path in list_files(self._folder)}
        removed = self._remove_old(state.files, paths)
        paths = {name: path for name, path in paths.items() if name not in removed}
        gone = state.files.keys() - paths.keys()
        found, read = self._read(state, paths, max_bytes)
        if state.changed or gone:
            self._store(state, gone, found)
        self._state = state
        return replace(read, removed=tuple(removed))

    def _current_state(self) -> _State:
        """Return the state of the last pass, or load it if it is not the stored one any more."""
        state = self._state
        if state is None:
            ensure_tables(self._engine)
        with self._engine.connect() as connection:
            if state is not None and state.passes == _stored_passes(connection, self._edge):
                return state
            return _load(connection, self._edge)

    def _read(self, state: _State, paths: Mapping[str, Path], max_bytes: int) -> tuple[_Read, Collected]:
        """Read the newest file first, so that no backlog delays the newest records, and move the positions."""
        found = _Read()
        records = broken = behind = num_files = 0
        for name in sorted(paths, reverse=True):
            path, position = paths[name], state.files.get(name, FilePosition())
            if (size := path.stat().st_size) <= position.position:
                continue
            lines, num_bytes, num_broken = _read_lines(path, position.position, max_bytes)
            max_bytes -= num_bytes
            good = len(lines)
            for line in lines:
                try:
                    found.add(line, state.models, file=name)
                except BrokenRecord:
                    good, num_broken = good - 1, num_broken + 1
            if num_bytes:
                if not position.position:
                    found.begun.add(name)
                state.files[name] = FilePosition(
                    position=position.position + num_bytes,
                    records=position.records + good,
                    broken=position.broken + num_broken,
                )
                state.changed.add(name)
            records, broken, num_files = records + good, broken + num_broken, num_files + bool(lines)
            behind += size - position.position - num_bytes
        if num_files > 1:
            found.requests.sort(key=lambda request: request.ended_ms)
        return found, Collected(records=records, broken=broken, behind_bytes=behind)

    def _remove_old(self, files: Mapping[str, FilePosition], paths: Mapping[str, Path]) -> list[str]:
        """Remove complete files whose retention is over and whose end an earlier pass has stored."""
        removed = []
        for name, path in paths.items():
            status = path.stat()
            counted = files[name].position if name in files else 0
            if (
                status.st_mtime + self._rotation.retention_s < time.time()
                and counted >= status.st_size
                and is_complete(path)
            ):
                path.unlink()
                removed.append(name)
        return removed

    def _store(self, state: _State, gone: Collection[str], read: _Read) -> None:
        found = _Found()
        for request in read.requests:
            state.activities.setdefault(request.rollout, Activity()).add(request)
        with updating(self._engine) as connection:
            do_not_flush(connection)
            _save(connection, self._edge, state, gone)
            counted = counted_rollouts(connection)
            for request in read.requests:
                if request.is_in_experiment and request.rollout in counted:
                    found.add(request, counted[request.rollout].slow_ms)
            admitted = admit(connection, counted, found.events, state.known.without_known(found.units))
            add_events(connection, admitted.events)
            add_units(connection, admitted.units)
            add_sizes(connection, admitted.new)
            known = {key: number for key, number in read.refusals.items() if key.model in state.models}
            remove_refusals(connection, self._edge, read.begun)
            add_refusals(connection, self._edge, known)
        state.known.add(admitted.units)
        state.passes += 1
        state.changed.clear()
        for name in gone:
            del state.files[name]


def _read_lines(path: Path, position: int, max_bytes: int) -> tuple[list[bytes], int, int]:
    """Return the complete lines from a position on, how many bytes they have, and how many of the bytes are no lines.

    If no process can write to the file any more, its last bytes are read, too, although their line is cut.
    """
    if max_bytes < MAX_LINE:
        return [], 0, 0
    complete = is_complete(path)  # before the read: what is written later is no cut line
    with path.open("rb") as file:
        file.seek(position)
        content = file.read(max_bytes)
    end = content.rfind(b"\n") + 1
    lines = content[:end].splitlines()
    if not end and len(content) >= MAX_LINE:  # a line without an end would stop the reader for ever
        return [], len(content), 1
    if complete and end < len(content) < max_bytes:
        return lines, len(content), 1
    return lines, end, 0


def _stored_passes(connection: sa.Connection, edge: str) -> int:
    """Return how many passes of an edge were stored; 0 if none is, or the rows were removed."""
    query = sa.select(READERS.c.passes).where(READERS.c.edge == edge)
    return int(connection.execute(query).scalar_one_or_none() or 0)


def _load(connection: sa.Connection, edge: str) -> _State:
    row = connection.execute(sa.select(READERS).where(READERS.c.edge == edge)).first()
    models = set(connection.execute(sa.select(REFUSALS.c.model).distinct()).scalars())
    if row is None:
        return _State(models=models)
    files = connection.execute(sa.select(FILES).where(FILES.c.edge == edge))
    return _State(
        passes=row.passes,
        models=models,
        files={
            file.name: FilePosition(position=file.position, records=file.records, broken=file.broken)
            for file in files
        },
        activities=activities_of(row.activities),
    )


def activities_of(text: str) -> dict[str, Activity]:
    """Return the stored activities of an edge, by rollout."""
    return {rollout: Activity.from_plain(values) for rollout, values in json.loads(text).items()}


def _save(connection: sa.Connection, edge: str, state: _State, gone: Collection[str]) -> None:
    """Store an edge's state.

    Raises:
        OtherReader: it was stored by another process since it was loaded.
    """
    now_ms = int(time.time() * 1000)
    activities = {
        rollout: asdict(activity)
        for rollout, activity in state.activities.items()
        if max(activity.last_ms.values(), default=0) > now_ms - FORGET_MS
    }
    values: dict[str, Any] = {
        "passes": state.passes + 1,
        "activities": json.dumps(activities),
        "read_ms": now_ms,
    }
    if state.passes:
        unchanged = (READERS.c.edge == edge) & (READERS.c.passes == state.passes)
        statement = READERS.update().where(unchanged).values(values)
    else:
        statement = upsert(READERS, connection).values(edge=edge, **values).on_conflict_do_nothing()
    if connection.execute(statement.returning(READERS.c.edge)).first() is None:
        raise OtherReader(f"Another process reads the access files of edge {edge}.")
    for name in sorted(state.changed):
        position = asdict(state.files[name])
        insert = upsert(FILES, connection).values(edge=edge, name=name, **position)
        keys = [FILES.c.edge, FILES.c.name]
        connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=position))
    if gone:
        connection.execute(FILES.delete().where(FILES.c.edge == edge, FILES.c.name.in_(sorted(gone))))


class Collector:
    """Runs a reader in a thread, twice a second.

    Args:
        reader: The reader.
        on_collected: Gets the result of each pass.
        interval_s: Seconds from one pass to the next.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        on_collected: Callable[[Collected], object] = lambda _: None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._reader = reader
        self._on_collected = on_collected
        self._interval_s = interval_s
        self._is_failing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evidence", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the thread during the `with` block."""
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._try_collect()
        self._try_collect()  # what the edge wrote until its end

    def _try_collect(self) -> None:
        try:
            collected = self._reader.collect()
        except Exception as error:  # noqa: BLE001 (without this thread, the rollouts of this edge would have no evidence)
            if not self._is_failing:  # one line for each outage
                LOG.warning("access records cannot be counted now; they stay in their files: %s", error)
            self._is_failing = True
            return
        self._is_failing = False
        self._on_collected(collected)
        if collected.broken:
            LOG.warning("%d lines of access files are no records", collected.broken)
