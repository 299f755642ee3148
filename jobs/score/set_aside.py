"""Rows that cannot be scored: each is set aside with a reason, and the other rows are scored.

Most checks are calls for many rows that fail as a whole if one row is bad. The bad rows are found by cutting the rows
in half again and again. So a few bad rows cost a few calls, and good rows cost no extra call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import FalajError, RefusedError

Bools = npt.NDArray[np.bool_]
Attempt = Callable[[int, int], None]
"""Tries rows [start, stop), and raises an error if one of them is bad."""


class TooManyBadRows(RefusedError):
    """A run sets aside more rows than its limit allows."""


def take(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Return some rows of a table, in ascending order. If these are all rows, nothing is copied."""
    return table if rows.size == table.num_rows else table.take(pa.array(rows))


def too_many(count: int, limit: int, reasons: Counter[str], *, in_part: bool = False) -> TooManyBadRows:
    """Return the error for more bad rows than the limit allows. It names the most frequent reason."""
    reason, _ = reasons.most_common(1)[0]
    where = "One part of the input has" if in_part else "The input has"
    return TooManyBadRows(
        f"{where} {count} rows that cannot be scored, and at most {limit} may be set aside. Most frequent reason: "
        f"{reason}. Correct the rows, or set a larger max_bad_share."
    )


class Reasons:
    """The reason of each bad row of a chunk.

    Args:
        rows: Number of rows of the chunk.
        limit: Largest number of bad rows of the whole input.
    """

    def __init__(self, rows: int, limit: int) -> None:
        self._reasons: npt.NDArray[np.object_] = np.full(rows, None, dtype=object)
        self._bad: Bools = np.zeros(rows, dtype=np.bool_)
        self._limit = limit
        self._count = 0

    @property
    def good(self) -> Bools:
        """Which rows have no reason."""
        return ~self._bad

    @property
    def text(self) -> pa.Array:
        """Reason of each row, null for good rows."""
        return pa.array(self._reasons, pa.string())

    @property
    def counts(self) -> Counter[str]:
        """Number of rows by reason."""
        return Counter(self._reasons[self._bad].tolist())

    def reject(self, rows: npt.NDArray[np.int64], reason: str) -> None:
        """Give rows a reason. A row keeps its first reason.

        Raises:
            TooManyBadRows: More rows than allowed are bad.
        """
        new = rows[~self._bad[rows]]
        self._reasons[new], self._bad[new] = reason, True
        self._count += new.size
        if self._count > self._limit:
            raise too_many(self._count, self._limit, self.counts, in_part=True)

    def reject_failing(
        self,
        rows: npt.NDArray[np.int64],
        attempt: Attempt,
        *errors: type[FalajError],
        reason: Callable[[FalajError], str] = str,
    ) -> None:
        """Find the rows with which an attempt fails, and give them a reason.

        Args:
            rows: Positions of the rows in the chunk; `attempt` gets positions in this list.
            attempt: Tries some of the rows.
            errors: Errors that mean that a row is bad.
            reason: Returns the reason for an error. It must not contain values of the row.
        """
        pending = [(0, rows.size)]
        while pending:
            start, stop = pending.pop()
            if start == stop:
                continue
            try:
                attempt(start, stop)
            except errors as error:
                if stop - start == 1:
                    self.reject(rows[start:stop], reason(error))
                else:
                    middle = (start + stop) // 2
                    pending += [(middle, stop), (start, middle)]
