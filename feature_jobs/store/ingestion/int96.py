"""Read INT96 times of Parquet exactly. Spark, Impala and old Hive write them as a day and nanoseconds within the day.

By default, Arrow reads them as nanoseconds, which overflow outside the years 1677 to 2262. It can also read them as
microseconds, which cuts off finer parts. This module reads both, so times are only changed by the rounding rules of
`instants`.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch


def exact_times(coarse: pa.Table, fine: pa.Table, rounded_up: Collection[str]) -> pa.Table:
    """Return the rows with exact or rounded-up microseconds in their INT96 columns.

    Args:
        coarse: the rows, read with INT96 as microseconds.
        fine: the INT96 columns of the same rows, read as nanoseconds.
        rounded_up: columns in which a finer time is rounded up.

    Raises:
        SchemaMismatch: a time of another column is finer than microseconds.
    """
    for name in fine.column_names:
        position = coarse.schema.get_field_index(name)
        micros = coarse.column(position).cast(pa.int64())
        finer = _is_finer(micros, fine[name].cast(pa.int64()))
        if not pc.any(finer, min_count=0).as_py():
            continue
        if name not in rounded_up:
            raise SchemaMismatch(
                f"Column '{name}' has times that are finer than microseconds. Write it with microseconds."
            )
        rounded = pc.add(micros, finer.cast(pa.int64()))
        coarse = coarse.set_column(position, name, rounded.cast(coarse.schema.field(position).type))
    return coarse


def _is_finer(micros: pa.ChunkedArray, nanos: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return one bool per time: true if it is finer than microseconds, false if its nanoseconds overflowed."""
    limit = (2**63 - 1) // 1000
    in_range = pc.and_(pc.less_equal(micros, limit - 1), pc.greater_equal(micros, -limit))
    safe_micros = pc.if_else(in_range, micros, pa.scalar(0, pa.int64()))
    rest = pc.subtract(nanos, pc.multiply(safe_micros, 1000))
    return pc.and_(in_range, pc.greater(rest, 0))
