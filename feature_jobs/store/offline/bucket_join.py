"""Join the entity rows of one bucket with the bucket's feature rows, piece by piece.

A piece is a few small files, one file, or one row group of a large file. First only the columns that decide which row
is newest are read. Then the features are read, only from the pieces that have a result and a few columns at a time. So
memory depends on the size of a piece and on the number of entity rows, but not on the size of the bucket. A bucket of
one piece is fetched from an object store as a whole; its files have at most `_PIECE_BYTES`, or it is one file.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from cluster.security.encryption.parquet import WHOLE_FILE_BYTES, ProtectedFile
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline.newest_rows import EntityRows, Found, NewestRows
from feature_jobs.store.offline.point_in_time import microseconds, order_of, take_or_null
from feature_jobs.store.offline.tables import BucketFile, Snapshot
from feature_jobs.store.offline.window_values import aggregate
from feature_jobs.store.types.columns import select_or_null
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

ABSENT = "__absent"
PIECE_ROWS = 2**20
_PIECE_FILES = 64
"""Greatest number of files of a piece. They are open at the same time."""
_PIECE_BYTES = WHOLE_FILE_BYTES
"""Greatest size of the files of a piece of several files."""
_BATCH_VALUES = 2**23
"""About this many feature values are read at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedBucket:
    """The result of a join of one bucket."""

    frame: pl.DataFrame
    """The features, and `ABSENT`, which is true where the entity row has no result; in the order of `EntityRows`."""
    hidden: int
    """Number of entity rows that have no result only because of the cutoff; 0 if the cutoff is off."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a bucket that is read at once."""

    files: tuple[BucketFile, ...]
    row_group: int | None = None
    """The row group of the only file; None for whole files."""

    @property
    def is_ordered(self) -> bool:
        """Whether its rows are in order, because they are from one file."""
        return len(self.files) == 1


def join_bucket(
    snapshot: Snapshot,
    view: ViewSpec,
    bucket: int,
    entities: EntityRows,
    cutoff: bool,
    *,
    piece_rows: int = PIECE_ROWS,
) -> JoinedBucket:
    """Join the entity rows of one bucket with their features.

    Args:
        snapshot: the view's table.
        view: the view.
        bucket: number of the bucket.
        entities: entity rows in that bucket.
        cutoff: whether to hide rows that were created after an entity row's time.
        piece_rows: greatest number of rows of a piece that consists of whole files.
    """
    if view.windows is not None:
        events = snapshot.read(bucket, view.windows.table_columns)
        answers = aggregate(
            entities.frame, events, keys=list(snapshot.key_types), windows=view.windows, cutoff=cutoff
        )
        return JoinedBucket(
            frame=answers.columns.with_columns(answers.absent.alias(ABSENT)), hidden=answers.hidden
        )
    pieces = _pieces(snapshot, bucket, piece_rows)
    ttl = None if view.ttl_s is None else dt.timedelta(seconds=view.ttl_s)
    search = NewestRows(entities, ttl_us=microseconds(ttl), cutoff=cutoff)
    names = [field.name for field in view.fields]
    # The rows of one file are in order, so they need no sequence numbers.
    is_one_file = len({piece.files for piece in pieces}) == 1 and pieces[0].is_ordered
    deciding = [*snapshot.key_types, EVENT, CREATED, *([] if is_one_file else [SEQ])]
    deciding += [DELETED] if snapshot.tombstones else []
    features: pl.DataFrame | None = None
    for piece in pieces:
        with _open(snapshot, piece, whole=len(pieces) == 1) as opened:
            rows = opened.read(deciding)
            search.add(rows, order=None if piece.is_ordered else order_of(rows))
            if len(pieces) == 1:
                found = search.found()
                features = opened.take(names, found.row, found.absent)
    found = search.found()
    if features is None:
        features = _from_pieces(snapshot, pieces, names, found)
    return JoinedBucket(frame=features.with_columns(pl.Series(ABSENT, found.absent)), hidden=found.hidden)


def _from_pieces(
    snapshot: Snapshot, pieces: Sequence[Piece], names: Sequence[str], found: Found
) -> pl.DataFrame:
    """Read the features of the rows that were found in several pieces."""
    parts: list[pl.DataFrame] = []
    place, taken = np.full(found.row.size, -1), 0
    for number, piece in enumerate(pieces):
        wanted = np.flatnonzero((found.piece == number) & ~found.absent)
        if wanted.size:
            with _open(snapshot, piece, whole=False) as opened:
                parts.append(opened.take(names, found.row[wanted], np.zeros(wanted.size, dtype=np.bool_)))
            place[wanted] = np.arange(taken, taken + wanted.size)
            taken += wanted.size
    if not parts:
        return pl.select(pl.repeat(None, place.size, dtype=pl.Null).alias(name) for name in names)
    return take_or_null(pl.concat(parts, how="vertical_relaxed"), place, found.absent)


def _pieces(snapshot: Snapshot, bucket: int, piece_rows: int) -> list[Piece]:
    pieces: list[Piece] = []
    small: list[BucketFile] = []
    for file in snapshot.files:
        if file.bucket != bucket:
            continue
        if file.rows > piece_rows:
            with snapshot.open(file, whole=False) as opened:
                pieces += [Piece((file,), group) for group in range(opened.num_row_groups)]
            continue
        group = (*small, file)
        is_full = (
            sum(other.rows for other in group) > piece_rows
            or sum(other.size_bytes for other in group) > _PIECE_BYTES
            or len(group) > _PIECE_FILES
        )
        if small and is_full:
            pieces.append(Piece(tuple(small)))
            small = []
        small.append(file)
    return [*pieces, *([Piece(tuple(small))] if small else [])]


class _OpenPiece:
    """The open files of a piece."""

    def __init__(self, piece: Piece, files: Sequence[ProtectedFile]) -> None:
        self._piece, self._files = piece, files

    def read(self, columns: Sequence[str]) -> pl.DataFrame:
        """Read columns. A column that a file lacks is null."""
        tables = [
            select_or_null(file.read(columns, row_group=self._piece.row_group), columns)
            for file in self._files
        ]
        return pl.DataFrame(pl.from_arrow(pa.concat_tables(tables, promote_options="permissive")))

    def take(self, columns: Sequence[str], rows: np.ndarray, absent: np.ndarray) -> pl.DataFrame:
        """Return columns of some rows, and nulls where a row is absent."""
        num_rows = min(PIECE_ROWS, sum(file.rows for file in self._piece.files))
        count = max(1, _BATCH_VALUES // max(1, num_rows))
        batches = (columns[start : start + count] for start in range(0, len(columns), count))
        return pl.concat(
            (take_or_null(self.read(batch), rows, absent) for batch in batches), how="horizontal"
        )


@contextlib.contextmanager
def _open(snapshot: Snapshot, piece: Piece, *, whole: bool) -> Iterator[_OpenPiece]:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(snapshot.open(file, whole=whole)) for file in piece.files]
        yield _OpenPiece(piece, files)
