"""Messages that were read and checked, wherever that was done, and where in the topic they stood.

They are plain data, so that several readers can each transform and check some partitions, and one committer can put
together what they give. Order is kept within a partition only, as by Kafka.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cluster.errors import Inconsistent
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.message_rows import check_messages
from feature_jobs.store.ingestion.pushed_rows import AT_ONCE, POSITION, CheckedRows


class Message(Protocol):
    """What a consumer gives."""

    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def value(self) -> bytes | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedMessages:
    """Some messages of a topic as rows; `POSITION` in `rows` is the place among them."""

    partitions: np.ndarray[Any, np.dtype[np.int64]]
    """(messages,)"""
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    """(messages,), growing within a partition."""
    values: pa.Array
    """(messages,), binary: as they came."""
    rows: CheckedRows
    starts: Mapping[int, int] = field(default_factory=dict)
    """By partition, from which offset on it was read; empty where nobody can have missed anything."""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def reached(self) -> dict[int, int]:
        """By partition, the last offset."""
        numbers = np.unique(self.partitions).tolist()
        return {number: int(self.offsets[self.partitions == number].max()) for number in numbers}

    def after(self, committed: Mapping[int, int]) -> CheckedMessages:
        """Those that a table does not have, which has each partition up to an offset.

        Raises:
            Inconsistent: a partition was not read from there on, so that messages between would be lost.
        """
        for number, start in self.starts.items():
            if start > committed[number] + 1:
                raise Inconsistent(
                    f"Partition {number} was read from offset {start} on, the table has it up to {committed[number]}. "
                    "Nothing was stored."
                )
        fresh = np.zeros(len(self), dtype=bool)
        for number, offset in committed.items():
            fresh |= (self.partitions == number) & (self.offsets > offset)
        if fresh.all():
            return self
        return CheckedMessages(
            partitions=self.partitions[fresh],
            offsets=self.offsets[fresh],
            values=self.values.filter(pa.array(fresh)),
            rows=CheckedRows(good=_kept(self.rows.good, fresh), bad=_kept(self.rows.bad, fresh)),
        )


def checked(
    messages: Sequence[Message],
    view: FeatureView,
    *,
    key_types: Mapping[str, str],
    now: dt.datetime,
    ahead: Ahead = AT_ONCE,
    starts: Mapping[int, int] | None = None,
) -> CheckedMessages:
    """Transform and check messages; arguments as those of `check_messages`."""
    values = [one.value() for one in messages]
    return CheckedMessages(
        partitions=np.array([one.partition() for one in messages], dtype=np.int64),
        offsets=np.array([one.offset() for one in messages], dtype=np.int64),
        values=pa.array(values, pa.binary()),
        rows=check_messages(values, view, key_types=key_types, now=now, ahead=ahead),
        starts=starts or {},
    )


def together(parts: Sequence[CheckedMessages]) -> CheckedMessages:
    """What several readers gave, who share no partition, as one; at least one part."""
    firsts = np.cumsum([0, *(len(part) for part in parts)])[:-1].tolist()
    good = [_moved(part.rows.good, first) for part, first in zip(parts, firsts, strict=True)]
    bad = [_moved(part.rows.bad, first) for part, first in zip(parts, firsts, strict=True)]
    # A part without a good row does not know the columns.
    filled = [rows for rows in good if rows.num_rows] or good[:1]
    return CheckedMessages(
        partitions=np.concatenate([part.partitions for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        values=pa.concat_arrays([part.values for part in parts]),
        rows=CheckedRows(
            good=pa.concat_tables(filled, promote_options="permissive"), bad=pa.concat_tables(bad)
        ),
        starts={number: start for part in parts for number, start in part.starts.items()},
    )


def _kept(rows: pa.Table, fresh: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.Table:
    places = np.array(rows[POSITION], dtype=np.int64)
    kept = rows.filter(pa.array(fresh[places]))
    return _placed(kept, (np.cumsum(fresh) - 1)[places[fresh[places]]])


def _moved(rows: pa.Table, first: int) -> pa.Table:
    return _placed(rows, np.array(rows[POSITION], dtype=np.int64) + first) if first else rows


def _placed(rows: pa.Table, places: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(POSITION), POSITION, pa.array(places, pa.int64()))
