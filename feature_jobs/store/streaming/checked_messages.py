"""Messages of a topic that were read, transformed and checked, with their positions in the topic.

`CheckedMessages` is plain data. So several readers can each check some partitions, and one committer combines the
results. Order is kept within a partition only, as in Kafka.
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
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.message_rows import check_messages
from feature_jobs.store.ingestion.pushed_rows import ONLINE_FUTURE_LIMIT, POSITION, CheckedRows


class Message(Protocol):
    """A message as a Kafka consumer returns it."""

    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def value(self) -> bytes | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedMessages:
    """Messages of a topic as rows. `POSITION` in `rows` is the index of the row's message."""

    partitions: np.ndarray[Any, np.dtype[np.int64]]
    """(messages,)"""
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    """(messages,), ascending within a partition."""
    values: pa.Array
    """(messages,), binary: the unchanged messages."""
    rows: CheckedRows
    starts: Mapping[int, int] = field(default_factory=dict)
    """By partition, the offset from which it was read; empty if no message can be missing."""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def last_offsets(self) -> dict[int, int]:
        """The last offset of each partition."""
        numbers = np.unique(self.partitions).tolist()
        return {number: int(self.offsets[self.partitions == number].max()) for number in numbers}

    def after(self, committed: Mapping[int, int]) -> CheckedMessages:
        """Return the messages after the committed offsets.

        Args:
            committed: for each partition, the last offset that the table has.

        Raises:
            Inconsistent: a partition was read from a later offset, so messages in between would be lost.
        """
        for number, start in self.starts.items():
            if start > committed[number] + 1:
                raise Inconsistent(
                    f"Partition {number} was read from offset {start}, but the table has it only up to "
                    f"{committed[number]}. Nothing was stored. Run the command again: it reads from the table's offset."
                )
        is_new = np.zeros(len(self), dtype=bool)
        for number, offset in committed.items():
            is_new |= (self.partitions == number) & (self.offsets > offset)
        if is_new.all():
            return self
        return CheckedMessages(
            partitions=self.partitions[is_new],
            offsets=self.offsets[is_new],
            values=self.values.filter(pa.array(is_new)),
            rows=CheckedRows(good=_filtered(self.rows.good, is_new), bad=_filtered(self.rows.bad, is_new)),
        )


def to_checked(
    messages: Sequence[Message],
    view: FeatureView,
    *,
    key_types: Mapping[str, str],
    now: dt.datetime,
    ahead: FutureLimit = ONLINE_FUTURE_LIMIT,
    starts: Mapping[int, int] | None = None,
) -> CheckedMessages:
    """Transform and check messages. For the arguments see `check_messages` and `CheckedMessages`."""
    values = [message.value() for message in messages]
    return CheckedMessages(
        partitions=np.array([message.partition() for message in messages], dtype=np.int64),
        offsets=np.array([message.offset() for message in messages], dtype=np.int64),
        values=pa.array(values, pa.binary()),
        rows=check_messages(values, view, key_types=key_types, now=now, ahead=ahead),
        starts=starts or {},
    )


def combine(parts: Sequence[CheckedMessages]) -> CheckedMessages:
    """Combine the messages of several readers, each of which reads other partitions. `parts` must not be empty."""
    firsts = np.cumsum([0, *(len(part) for part in parts)])[:-1].tolist()
    good = [_shifted(part.rows.good, first) for part, first in zip(parts, firsts, strict=True)]
    bad = [_shifted(part.rows.bad, first) for part, first in zip(parts, firsts, strict=True)]
    # A part without good rows does not have the view's columns.
    with_rows = [rows for rows in good if rows.num_rows] or good[:1]
    return CheckedMessages(
        partitions=np.concatenate([part.partitions for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        values=pa.concat_arrays([part.values for part in parts]),
        rows=CheckedRows(
            good=pa.concat_tables(with_rows, promote_options="permissive"), bad=pa.concat_tables(bad)
        ),
        starts={number: start for part in parts for number, start in part.starts.items()},
    )


def _filtered(rows: pa.Table, is_new: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.Table:
    """Return the rows of new messages, with positions among these messages."""
    positions = np.array(rows[POSITION], dtype=np.int64)
    filtered = rows.filter(pa.array(is_new[positions]))
    return _with_positions(filtered, (np.cumsum(is_new) - 1)[positions[is_new[positions]]])


def _shifted(rows: pa.Table, first: int) -> pa.Table:
    return _with_positions(rows, np.array(rows[POSITION], dtype=np.int64) + first) if first else rows


def _with_positions(rows: pa.Table, positions: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
    index = rows.schema.get_field_index(POSITION)
    return rows.set_column(index, POSITION, pa.array(positions, pa.int64()))
